"""Token files to batches: windows of the flat stream, in a seeded order, each batch computable from its step alone.

Window w holds tokens w·T … w·T + T, where T is `seq_len`: the first T are inputs, the last T their targets, so that
every token but the stream's first is a target exactly once. Documents follow each other within a window; `doc_start`
tells where. What is left at the end, less than one window, is dropped.

The order is a fresh permutation of the windows in every epoch, from integer arithmetic of our own: NumPy and PyTorch
do not promise their random streams across versions, and a resumed run must see the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torch_engram.data.token_files import TokenFile

IGNORE_INDEX = -100

_ROUNDS = 6
_UInts = np.ndarray[Any, np.dtype[np.uint64]]
_Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens.

    Attributes:
        tokens: int64 [B, T].
        targets: int64 [B, T], the token after each; `IGNORE_INDEX` where that is the next document's first, which
            nothing before it can predict.
        doc_start: bool [B, T], true at the first token of each document, and at position 0 of every sequence, for
            nothing before it is visible.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    doc_start: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; from pinned memory the copy does not wait."""
        moved = (tensor.to(device, non_blocking=True) for tensor in (self.tokens, self.targets, self.doc_start))
        return Batch(*moved)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return Batch(self.tokens.pin_memory(), self.targets.pin_memory(), self.doc_start.pin_memory())


class PackedBatches:
    """Batches without end, each computed from its number alone: a run is resumed by counting on.

    Every window comes once per epoch; a batch may span two epochs.
    """

    def __init__(self, token_file: TokenFile, batch_size: int, seq_len: int, seed: int = 0) -> None:
        """
        Args:
            token_file: one split of a corpus.
            batch_size: sequences a batch (B).
            seq_len: tokens a sequence (T).
            seed: orders the windows.

        Raises:
            ValueError: a size is below 1, or the file is shorter than one sequence and its last target.
        """
        for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give at least 1.")
        if len(token_file) < seq_len + 1:
            raise ValueError(
                f"{token_file.path} has {len(token_file)} tokens and one sequence of seq_len={seq_len} needs "
                f"{seq_len + 1}; give a longer corpus or a shorter seq_len."
            )
        self.token_file = token_file
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.windows = (len(token_file) - 1) // seq_len

    @property
    def packs_documents(self) -> bool:
        """Whether in any window a document begins after the first token, so that attention needs a mask there."""
        starts = self.token_file.starts
        return bool((starts[starts < self.windows * self.seq_len] % self.seq_len).any())

    def batch(self, step: int) -> Batch:
        """Batch number `step`, counted from 0 over all epochs."""
        return self._gather(self.windows_of(step, step + 1))

    def windows_of(self, first: int, last: int) -> _Ints:
        """The windows of batches `first` to `last` - 1 in their order: int64 [(last - first) * B]."""
        epochs, positions = np.divmod(np.arange(first * self.batch_size, last * self.batch_size), self.windows)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permute(positions[here], self.windows, self.seed, int(epoch))
        return windows

    def in_order(self, start: int = 0, step: int = 1) -> Iterator[Batch]:
        """Every window exactly once, in the file's order, for evaluation; the last batch may be smaller.

        Of these batches every `step`-th from number `start` on.
        """
        for first in range(start * self.batch_size, self.windows, step * self.batch_size):
            yield self._gather(np.arange(first, min(first + self.batch_size, self.windows)))

    def _gather(self, windows: _Ints) -> Batch:
        """The given windows as a batch, [B] window numbers → [B, T] tensors."""
        firsts = windows * self.seq_len
        tokens = np.stack([self.token_file.tokens[first : first + self.seq_len + 1] for first in firsts.tolist()])
        starts = self.token_file.starts
        doc_start = np.zeros(tokens.shape, dtype=bool)
        for row, first in enumerate(firsts.tolist()):
            low, high = np.searchsorted(starts, [first, first + self.seq_len + 1])
            doc_start[row, starts[low:high] - first] = True
        stream = torch.from_numpy(tokens.astype(np.int64))
        begins = torch.from_numpy(doc_start)
        targets = stream[:, 1:].masked_fill(begins[:, 1:], IGNORE_INDEX)
        begins[:, 0] = True
        return Batch(stream[:, :-1].contiguous(), targets, begins[:, :-1].contiguous())


def permute(positions: _Ints, size: int, seed: int, epoch: int) -> _Ints:
    """A seeded permutation of range(size), evaluated at the given positions only.

    A Feistel network permutes the smallest square power of two that holds `size`; what falls outside the range is
    permuted again until it falls inside, which keeps the whole a permutation.

    Args:
        positions: int64 [n], 0 <= position < size.
        size: how many things are permuted.
        seed: any integer; its low 64 bits count.
        epoch: another order for the same seed.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    stream = _splitmix64(np.array([seed & (1 << 64) - 1], np.uint64)) ^ np.uint64(epoch)
    keys = _splitmix64(_splitmix64(stream) ^ np.arange(_ROUNDS, dtype=np.uint64))
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_splitmix64(right ^ key) & mask)
        values[outside] = left << half | right
        outside = values >= size
    return values.astype(np.int64)


def _splitmix64(values: _UInts) -> _UInts:
    """The splitmix64 mixing function, [n] → [n], modulo 2⁶⁴."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
