"""How the rows of a memory are used: how often each was updated, and how many n-grams share one.

The first is read from the ``count`` plane that every trained table keeps, in chunks, so that a table of any size fits.
The second is computed from tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_engram.addressing import Addressing
from torch_engram.data import Batch
from torch_engram.memory import MemoryBank
from torch_engram.memory.tables import Table
from torch_engram.stores import CODECS, RecordLayout, make_keys

_CHUNK_BYTES = 1 << 26  # of records held at a time

_Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class TableUsage:
    """The update counts of one table's rows."""

    memory: str
    layer: int
    orders: tuple[int, ...]
    """The n-gram orders whose heads lie in the table: all of a layer's, unless they differ in row width."""
    rows: int
    updated: int
    """Rows that at least one optimiser step updated."""
    histogram: tuple[int, ...]
    """Rows by update count: entry 0 counts the rows never updated, entry k those updated 2^(k-1) to 2^k - 1 times."""


@dataclass(frozen=True)
class Sharing:
    """How many of the distinct n-grams of some tokens meet in one row, over the heads of one order of one layer."""

    memory: str
    layer: int
    order: int
    heads: int
    rows: int
    """Rows of all the order's heads."""
    ngrams: int
    """Distinct n-grams of this order in the tokens."""
    reached: int
    """Rows that at least one of them reads."""
    largest: int
    """Distinct n-grams of the row that the most of them share."""

    @property
    def mean(self) -> float:
        """Distinct n-grams of a reached row on average."""
        return self.heads * self.ngrams / self.reached if self.reached else 0.0


def bin_label(number: int) -> str:
    """The update counts of histogram entry ``number``: ``0``, ``1``, ``2–3``, ``4–7`` and so on."""
    if number < 2:
        return str(number)
    return f"{2 ** (number - 1)}–{2**number - 1}"


def table_usage(bank: MemoryBank) -> list[TableUsage]:
    """The update counts of every table of a bank, read through its store in chunks."""
    bank.flush()
    return [_usage(bank, table) for table in bank.tables]


def _usage(bank: MemoryBank, table: Table) -> TableUsage:
    bins = torch.zeros(33, dtype=torch.int64)  # a count is an int32
    for counts in _counts(bank, table):
        # frexp writes a count as m * 2^e with m in [0.5, 1): e is its bin, and 0 has e = 0.
        bins += torch.frexp(counts.double()).exponent.long().bincount(minlength=len(bins)).cpu()
    last = int(bins.nonzero().max()) if bins.any() else 0
    orders = tuple(sorted({bank.config.orders[order] for order in table.orders}))
    histogram = tuple(bins[: last + 1].tolist())
    return TableUsage(bank.name, table.layer, orders, table.rows, table.rows - histogram[0], histogram)


def _counts(bank: MemoryBank, table: Table) -> Iterator[Tensor]:
    """The update counts int32 of a table's rows, chunk by chunk."""
    store, layout = bank.source(table).store, bank.source(table).format.layout
    chunk = max(1, _CHUNK_BYTES // layout.nbytes)
    for first in range(0, table.rows, chunk):
        rows = torch.arange(first, min(first + chunk, table.rows), device=bank.device)
        yield _decode_counts(layout, store.fetch(make_keys(table.space, rows)))


def _decode_counts(layout: RecordLayout, records: Tensor) -> Tensor:
    parts = tuple(layout.view(records, field) for field in layout.fields if field.plane == "count")
    return CODECS[layout.plane("count").codec].decode(parts).reshape(-1)


def ngram_sharing(addressing: Addressing, batches: Iterable[Batch], *, memory: str = "engram") -> list[Sharing]:
    """How the distinct n-grams of some batches share rows, for every layer and order of a memory named ``memory``.

    An n-gram is what the hash sees: at a document's start the positions before it read as the pad. Holds one window of
    N ids a token.
    """
    config = addressing.config
    windows = torch.cat(
        [addressing.windows(batch.tokens, doc_start=batch.doc_start).flatten(0, 1) for batch in batches]
    )
    found = []
    for order, heads in zip(config.orders, config.per_order("heads"), strict=True):
        distinct = _distinct(windows.numpy()[:, :order], config.vocab_size)
        ngrams = windows[torch.from_numpy(distinct)]
        start = sum(config.per_order("heads")[: order - 2])
        for layer in config.layers:
            rows = addressing.rows(ngrams[None], layer)[1][0, :, start : start + heads]
            _, meeting = rows.unique(return_counts=True)  # heads have rows of their own, so they never meet
            size = sum(addressing.layouts[layer].primes[order - 2])
            found.append(Sharing(memory, layer, order, heads, size, len(distinct), len(meeting), int(meeting.max())))
    return sorted(found, key=lambda sharing: (sharing.layer, sharing.order))


def _distinct(ngrams: _Ints, vocab_size: int) -> _Ints:
    """Indices of one example of each distinct row of int64 ``[P, n]``. An n-gram is packed id by id into one integer;
    numbering what is there before each step keeps it below P·V, which fits where V^n would not."""
    keys = ngrams[:, 0]
    for column in range(1, ngrams.shape[1]):
        _, number = np.unique(keys, return_inverse=True)
        keys = number.astype(np.int64) * vocab_size + ngrams[:, column]
    _, first = np.unique(keys, return_index=True)
    return first
