"""Validation loss by how often a position's n-gram was seen in training: what a memory knows, against what is rare.

The n-gram of a position is the last n canonical ids that the model has read there, within its document; the loss is
that of the next token. Positions with fewer than n tokens of their document before them have none and are left out.
Counting is exact: an n-gram is packed into one integer, and the integers are sorted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torch_engram.addressing import CanonicalVocab
from torch_engram.data import IGNORE_INDEX, Batch
from torch_engram.memory import MemoryBank
from torch_engram.models import Decoder
from torch_engram.train.evaluate import read_memory
from torch_engram.train.loss import head_losses

BIN_STARTS = (0, 1, 2, 4, 16, 64)
"""First occurrence count of every bin; the last one is open."""
BIN_LABELS = ("0", "1", "2–3", "4–15", "16–63", "64+")

_MERGE_AT = 1 << 24  # positions held before they are merged into the counts

_Ints = np.ndarray[Any, np.dtype[np.int64]]


def packed_ngrams(vocab: CanonicalVocab, batch: Batch, order: int) -> _Ints:
    """The n-gram of every position of a batch as one integer: int64 ``[B, T]``, -1 where there is none.

    Raises ``ValueError`` where so many ids of the vocabulary do not fit into 63 bits.
    """
    if vocab.size**order >= 2**63:
        raise ValueError(f"n-grams of order {order} over {vocab.size} ids do not fit into 63 bits: use a lower order.")
    ids = vocab.ids[batch.tokens].numpy()
    position = np.arange(ids.shape[1])
    begin = np.maximum.accumulate(np.where(batch.doc_start.numpy(), position, 0), axis=1)
    packed = np.zeros_like(ids)
    for age in range(order):
        earlier = np.zeros_like(ids)
        earlier[:, age:] = ids[:, : ids.shape[1] - age]
        packed = packed * vocab.size + earlier
    packed[position - begin < order - 1] = -1
    return packed


@dataclass(frozen=True)
class NgramCounts:
    """How often every n-gram of one order occurs in some batches."""

    order: int
    keys: _Ints
    """The packed n-grams that occur, int64 ascending."""
    counts: _Ints
    """Occurrences of each, int64."""

    def of(self, packed: _Ints) -> _Ints:
        """Occurrences of packed n-grams, in their shape; -1 where there is none (packed -1)."""
        if not len(self.keys):
            return np.where(packed >= 0, 0, -1)
        at = np.searchsorted(self.keys, packed).clip(max=len(self.keys) - 1)
        found = np.where(self.keys[at] == packed, self.counts[at], 0)
        return np.where(packed >= 0, found, -1)

    def with_more(self, packed: Sequence[_Ints]) -> NgramCounts:
        """These counts and the n-grams of further positions."""
        new, times = np.unique(np.concatenate(packed), return_counts=True)
        keys, which = np.unique(np.concatenate([self.keys, new]), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, which, np.concatenate([self.counts, times]))
        return NgramCounts(self.order, keys, counts)


def count_ngrams(vocab: CanonicalVocab, batches: Iterable[Batch], orders: Sequence[int] = (2, 3)) -> list[NgramCounts]:
    """Occurrences of the n-grams of each order in the batches that a run was trained on, repeats included."""
    counts = [NgramCounts(order, np.zeros(0, np.int64), np.zeros(0, np.int64)) for order in orders]
    waiting: list[list[_Ints]] = [[] for _ in orders]

    def merge() -> None:
        for number, packed in enumerate(waiting):
            if packed:
                counts[number] = counts[number].with_more(packed)
                packed.clear()

    held = 0
    for batch in batches:
        for order, own in zip(orders, waiting, strict=True):
            packed = packed_ngrams(vocab, batch, order)
            own.append(packed[packed >= 0])
        held += batch.tokens.numel()
        if held >= _MERGE_AT:
            merge()
            held = 0
    merge()
    return counts


@dataclass(frozen=True)
class FrequencySplit:
    """Mean losses by how often the n-gram of one order occurred in training, one entry a bin of :data:`BIN_LABELS`."""

    order: int
    positions: tuple[int, ...]
    """Predicted positions."""
    nats: dict[str, tuple[float, ...]]
    """Nats a token by model; NaN for a bin without a position."""


@torch.no_grad()
def loss_by_frequency(
    models: Mapping[str, tuple[Decoder, Mapping[str, MemoryBank]]],
    vocab: CanonicalVocab,
    batches: Iterable[Batch],
    counts: Sequence[NgramCounts],
    *,
    dtype: str = "fp32",
) -> list[FrequencySplit]:
    """The losses of several models on the same validation batches, split by the training counts of each order.

    ``models``: decoder and banks by name, all over one tokenizer. ``dtype``: ``fp32`` or ``bf16``, as for training.
    """
    bins = len(BIN_STARTS)
    positions = np.zeros((len(counts), bins), np.int64)
    totals = {name: np.zeros((len(counts), bins)) for name in models}
    for batch in batches:
        predicted = (batch.targets != IGNORE_INDEX).numpy()
        which = [_bins(count.of(packed_ngrams(vocab, batch, count.order)), predicted) for count in counts]
        for number, chosen in enumerate(which):
            positions[number] += np.bincount(chosen[chosen >= 0], minlength=bins)
        for name, (decoder, banks) in models.items():
            losses = _losses(decoder, banks, batch, dtype)
            for number, chosen in enumerate(which):
                kept = chosen >= 0
                totals[name][number] += np.bincount(chosen[kept], losses[kept], minlength=bins)
    return [
        FrequencySplit(
            count.order,
            tuple(positions[number].tolist()),
            {
                name: tuple(_mean(s, n) for s, n in zip(total[number], positions[number], strict=True))
                for name, total in totals.items()
            },
        )
        for number, count in enumerate(counts)
    ]


def _bins(occurrences: _Ints, predicted: np.ndarray[Any, np.dtype[np.bool_]]) -> _Ints:
    """The bin of every position int64 ``[B, T]``; -1 where there is no n-gram or no target."""
    bins = np.searchsorted(np.array(BIN_STARTS), occurrences, side="right") - 1
    return np.where(predicted, bins, -1)


def _losses(
    decoder: Decoder, banks: Mapping[str, MemoryBank], batch: Batch, dtype: str
) -> np.ndarray[Any, np.dtype[np.float64]]:
    device = decoder.embedding.weight.device
    on_device = batch.to(device)
    was_training = decoder.training
    decoder.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        memory = read_memory(banks, batch)
        hidden = decoder(on_device.tokens, memory, doc_start=on_device.doc_start, return_hidden=True)
        losses = head_losses(hidden, decoder.head.weight, on_device.targets, decoder.pad_bias)
    decoder.train(was_training)
    return losses.double().cpu().numpy()


def _mean(total: float, count: int) -> float:
    return float(total / count) if count else math.nan
