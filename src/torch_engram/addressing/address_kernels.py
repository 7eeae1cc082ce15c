"""Tokens to row ids of all layers in one pass on a GPU: the Triton twin of the windows and hashes of :mod:`ngrams`.

A program takes some positions and one layer. Every position finds its own n-gram again for every layer, which is a few
cached loads and cheaper than memory in between; a tile then holds each column's mix, so that every row id is one
remainder and a position's rows are written side by side. Row ids and offsets are int64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.addressing.layout import LayerLayout

_ROW_IDS = 1024
"""Row ids that one program finds."""


@dataclass(frozen=True)
class Hashes:
    """What the kernel needs to know of one memory, on one device; all int64."""

    canonical: Tensor | None
    """``[V]``: the canonical id of every raw id; None where raw ids are hashed."""
    raw_size: int
    """V."""
    pad: int
    """What a blocked position reads as; where raw ids are hashed, a segment also ends after it."""
    multipliers: Tensor
    """``[L, N]``, newest position first."""
    primes: Tensor
    """``[L, C]``, like ``offsets``."""
    offsets: Tensor
    ages: Tensor
    """``[C]``: the age, 1 to N-1, of the oldest token that a column hashes."""

    @classmethod
    def of(
        cls, layouts: Iterable[LayerLayout], canonical: Tensor | None, raw_size: int, pad: int, device: torch.device
    ) -> Hashes:
        """The constants of some layers, whose heads are alike in number, in their order."""

        def here(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        layers = list(layouts)
        ages = [age for age, heads in enumerate(layers[0].primes, start=1) for _ in heads]
        return cls(
            canonical.to(device) if canonical is not None else None,
            raw_size,
            pad,
            multipliers=here([layer.multipliers for layer in layers]),
            primes=here([layer.flat_primes for layer in layers]),
            offsets=here([layer.offsets for layer in layers]),
            ages=here(ages),
        )


def address_triton(
    tokens: Tensor,
    start: Tensor,
    dead: Tensor,
    context: int,
    hashes: Hashes,
    with_mixes: bool,
    stranger: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mixes ``[L, B, T, N-1]`` and row ids ``[L, B, T, C]``; ``stranger``, bool ``[1]``, becomes True where a token is
    outside the vocabulary.

    ``tokens``: raw ids int64 ``[B, context + T]``; the first ``context`` positions are looked back on and get no rows.
    ``start``, ``dead``: bool, alike: document starts, and tokens that no n-gram sees. Without ``with_mixes`` the mixes
    are ``[L, B, T, 0]``. Nothing waits for the device; where a token was outside, its position's row ids mean nothing.
    """
    batch, length = tokens.shape[0], tokens.shape[1] - context
    (layers, highest), columns = hashes.multipliers.shape, len(hashes.ages)
    mixes = tokens.new_empty(layers, batch, length, highest - 1 if with_mixes else 0)
    rows = tokens.new_empty(layers, batch, length, columns)
    if batch * length:
        tile = triton.next_power_of_2(columns)
        per_program = max(1, _ROW_IDS // tile)
        if not _side_by_side(tokens, start, dead):
            tokens, start, dead = tokens.contiguous(), start.contiguous(), dead.contiguous()
        _address[triton.cdiv(batch * length, per_program), layers](
            tokens, start.view(torch.uint8), dead.view(torch.uint8), tokens.stride(0),
            hashes.canonical, hashes.multipliers, hashes.primes, hashes.offsets, hashes.ages,
            mixes, rows, stranger.view(torch.uint8),
            batch * length, length, context, hashes.raw_size, hashes.pad, columns,
            ORDERS=highest, MIXES=with_mixes, POSITIONS=per_program, COLUMNS=tile,
        )  # fmt: skip
    return mixes, rows


def _side_by_side(*given: Tensor) -> bool:
    """Whether positions lie side by side, and all sequences as far from each other."""
    return all(tensor.stride() == (given[0].stride(0), 1) for tensor in given)


@triton.jit(do_not_specialize=("stride",))
def _address(
    tokens, start, dead, stride, canonical, multipliers, primes, offsets, ages, mixes, rows, stranger,
    positions, length, context, raw_size, pad, columns,
    ORDERS: tl.constexpr, MIXES: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = at < positions
    position = at % length + context
    here = at // length * stride + position
    newest = tl.load(tokens + here, mask=inside, other=0)
    tl.store(stranger + at * 0, 1, mask=inside & ((newest < 0) | (newest >= raw_size)))

    column = tl.arange(0, COLUMNS)
    age_of_column = tl.load(ages + column, mask=column < columns, other=0)
    mix = tl.zeros([POSITIONS], tl.int64)
    mix_of_column = tl.zeros([POSITIONS, COLUMNS], tl.int64)
    blocked = at >= positions
    for age in tl.static_range(ORDERS):
        blocked |= position < age
        if age > 0:  # the token that is one newer may begin a document
            blocked |= tl.load(start + here - age + 1, mask=~blocked, other=1) != 0
        blocked |= tl.load(dead + here - age, mask=~blocked, other=1) != 0
        token = tl.load(tokens + here - age, mask=~blocked, other=0)
        if canonical is None:
            if age > 0:  # a segment ends after EOS
                blocked |= token == pad
            ngram_id = tl.where(blocked, pad, token)
        else:
            known = ~blocked & (token >= 0) & (token < raw_size)
            ngram_id = tl.load(canonical + token, mask=known, other=pad)
        mix ^= ngram_id * tl.load(multipliers + layer * ORDERS + age)
        mix_of_column = tl.where((age_of_column == age)[None], mix[:, None], mix_of_column)
        if MIXES and age > 0:
            tl.store(mixes + (layer * positions + at) * (ORDERS - 1) + age - 1, mix, mask=inside)

    prime = tl.load(primes + layer * columns + column, mask=column < columns, other=1)
    offset = tl.load(offsets + layer * columns + column, mask=column < columns, other=0)
    row = mix_of_column % prime[None] + offset[None]
    to = (layer * positions + at)[:, None] * columns + column[None]
    tl.store(rows + to, row, mask=inside[:, None] & (column < columns)[None])
