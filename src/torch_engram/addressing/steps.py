"""Decoding on a CPU: one position of every sequence to its row ids, of all layers together.

These are the windows and hashes of :mod:`torch_engram.addressing.ngrams` for the last position alone. So few numbers
are NumPy's: its calls cost a fraction of PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_engram.addressing.layout import LayerLayout

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class StepHashes:
    """What is known of one memory; L layers, C columns, N the highest order."""

    canonical: Ints | None
    """``[V]``: the canonical id of every raw id; None where raw ids are hashed."""
    pad: int
    """What a blocked position reads as; where raw ids are hashed, a segment also ends after it."""
    multipliers: Ints
    """``[L, 1, N]``, newest position first."""
    primes: Ints
    """``[L, 1, C]``, like ``offsets``."""
    offsets: Ints
    mix_of_column: Ints
    """``[C]``: which of the N-1 mixes a column hashes."""

    @classmethod
    def of(cls, layouts: Iterable[LayerLayout], canonical: Ints | None, pad: int) -> StepHashes:
        """The constants of some layers, whose heads are alike in number, in their order."""

        def each(values: Any) -> Ints:
            return np.array(values, dtype=np.int64)

        layers = list(layouts)
        return cls(
            canonical,
            pad,
            multipliers=each([layer.multipliers for layer in layers])[:, None],
            primes=each([layer.flat_primes for layer in layers])[:, None],
            offsets=each([layer.offsets for layer in layers])[:, None],
            mix_of_column=each([mix for mix, heads in enumerate(layers[0].primes) for _ in heads]),
        )

    def rows(self, tokens: Ints, start: Flags, dead: Flags) -> tuple[Ints, Ints]:
        """Mixes ``[L, B, N-1]`` and row ids ``[L, B, C]`` of the last of some positions ``[B, S]``, S up to N: raw ids
        that are all in the vocabulary, document starts, and tokens that no n-gram sees."""
        ids, blocked = tokens[:, ::-1], dead[:, ::-1].copy()  # newest first
        blocked[:, 1:] |= start[:, :0:-1]
        if self.canonical is None:  # a segment ends after EOS
            blocked[:, 1:] |= ids[:, 1:] == self.pad
        blocked = np.logical_or.accumulate(blocked, axis=1)  # once one is blocked, all older ones are
        window = np.full((len(ids), self.multipliers.shape[2]), self.pad)
        window[:, : ids.shape[1]] = np.where(blocked, self.pad, ids if self.canonical is None else self.canonical[ids])
        mixes = np.bitwise_xor.accumulate(window * self.multipliers, axis=2)[:, :, 1:]
        return mixes, mixes[:, :, self.mix_of_column] % self.primes + self.offsets
