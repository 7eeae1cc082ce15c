"""n-gram windows to mixes to rows: the arithmetic of the hash, vectorised.

``rows_naive`` reads like the formula. :class:`Limbs` gives the same ids without a 64-bit division, which no vector
unit has: a mix is cut in two limbs, and from there on float64 is precise enough for an exact result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

_BLOCK = 8192  # positions a pass: the temporaries then stay in a core's cache
_TILE = 128  # positions that constants are repeated for; divides a block
_LOW_BITS = 40
_LARGEST_PRIME = 2**25
"""Up to it, s = high·(2**40 mod p) + low stays below 2**48 + 2**40. The fraction of (s + 1/4)/p is (row + 1/4)/p, and
the four roundings on the way to it move row + 1/4 by no more than 4·2**-53·(2**48 + 2**40), about an eighth."""
_INTEGERS = 2.0**52  # from here to 2**53 the float64 numbers are the integers, and their last 52 bits count them
_INTEGER_BITS = 0x433 << 52  # the bits of 2.0**52


def mixes(windows: Tensor, multipliers: Tensor) -> Tensor:
    """N-gram windows int64 ``[..., N]`` (newest first) to mixes ``[..., N-1]``, one for each order 2..N."""
    by_age = windows.movedim(-1, 0).contiguous()  # each order's mixes then lie together in memory, too
    mix = by_age * multipliers.view(-1, *[1] * (windows.ndim - 1))
    for order in range(1, len(mix)):
        mix[order] ^= mix[order - 1]
    return mix[1:].movedim(0, -1)


def rows_naive(mix: Tensor, primes: tuple[Tensor, ...], offsets: Tensor) -> Tensor:
    """Mixes ``[..., N-1]`` to row ids ``[..., C]``: modulo each head's prime, plus the head's offset."""
    heads = [mix[..., i, None] % order for i, order in enumerate(primes)]
    return torch.cat(heads, dim=-1) + offsets


def reducer(primes: tuple[Tensor, ...], offsets: Tensor) -> Callable[[Tensor], Tensor]:
    """The fastest function that equals :func:`rows_naive` for non-negative mixes, made once for many calls."""
    if offsets.device.type == "cpu" and max(int(order.max()) for order in primes) <= _LARGEST_PRIME:
        return Limbs.of(primes, offsets).rows
    return partial(rows_naive, primes=primes, offsets=offsets)


@dataclass(frozen=True)
class Limbs:
    """One layer's constants for remainders without division, made once."""

    weights: Tensor
    """float64 ``[2·(N-1), C]``: what each order's high and low limb add to s/p of each column."""
    primes: Tensor
    """float64 ``[_TILE·C]``, like ``offsets``: each column's, repeated, because reading a long row of constants costs
    less than broadcasting a short one, and this one stays in the first-level cache."""
    offsets: Tensor

    @classmethod
    def of(cls, primes: tuple[Tensor, ...], offsets: Tensor) -> Limbs:
        """The constants of a layer whose primes are all up to ``_LARGEST_PRIME``."""
        prime = torch.cat(primes)
        which = [torch.ones(1, len(heads), dtype=torch.float64) for heads in primes]
        mine = torch.block_diag(*which)  # [N-1, C]: which order's mix a column hashes
        weights = torch.cat((mine * ((1 << _LOW_BITS) % prime), mine)) / prime
        return cls(weights, prime.double().repeat(_TILE), (offsets + int(_INTEGERS)).double().repeat(_TILE))

    def rows(self, mix: Tensor) -> Tensor:
        """Non-negative mixes ``[..., N-1]`` to row ids ``[..., C]``."""
        (limbs, columns), tile = self.weights.shape, len(self.primes)
        by_order = mix.movedim(-1, 0).reshape(limbs // 2, -1)
        positions = by_order.shape[1]
        block = min(_BLOCK, -(-positions // _TILE) * _TILE)  # whole tiles: the last pass also reduces what is left over
        cut = torch.empty(limbs, block, dtype=torch.int64)
        exact = torch.empty(limbs, block, dtype=torch.float64)
        row = torch.empty(block, columns, dtype=torch.float64)
        tiles, bits = row.view(-1, tile), row.view(torch.int64)
        # NumPy asks for huge pages, which a result of this size is filled faster in.
        out = torch.from_numpy(np.empty((positions, columns), np.int64))
        for start in range(0, positions, _BLOCK):
            _cut(by_order[:, start : start + _BLOCK], cut, exact)
            torch.mm(exact.t(), self.weights, out=row).frac_()  # of (s + 1/4) / p, for every head
            torch.addcmul(self.offsets, tiles, self.primes, out=tiles)  # rounds to the integer 2**52 + offset + row
            rows = out[start : start + _BLOCK]
            torch.bitwise_xor(bits[: len(rows)], _INTEGER_BITS, out=rows)
        return out.view(*mix.shape[:-1], columns)


def _cut(mix: Tensor, cut: Tensor, exact: Tensor) -> None:
    """Mixes ``[N-1, n]`` to their high limbs, then their low limbs plus 1/4, in ``exact``; ``cut`` is scratch."""
    high, low = cut[:, : mix.shape[1]].chunk(2)
    torch.bitwise_right_shift(mix, _LOW_BITS, out=high)
    torch.bitwise_and(mix, 2**_LOW_BITS - 1, out=low)
    exact.copy_(cut)[len(mix) :].add_(0.25)
