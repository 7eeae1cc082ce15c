"""The reads of one table in a memory that is only read, through a cache by n-gram: no row is sorted out or held.

What addressing gives goes in, embeddings come out (:class:`~torch_engram.stores.ngram_cache.NgramCache`). And what
caches have counted, as a bank names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from torch_engram.memory.rows import TouchedRows
from torch_engram.memory.segments import unique_rows
from torch_engram.memory.source import Source
from torch_engram.memory.tables import Table
from torch_engram.stores import Begun, CachedStore, Heads, NgramCache


def heads_of(table: Table) -> Heads:
    """How a table's rows are read."""
    return Heads(table.space, tuple(len(list(run)) for _, run in groupby(table.orders)), table.first_row)


def counts_by_order(tables: Sequence[Table], sources: Sequence[Source]) -> dict[tuple[int, int], dict[str, int]]:
    """What the caches of some tables have counted, by layer and order; order 0 stands for all of a cache by row."""
    found: dict[tuple[int, int], Counter[str]] = {}
    for table, source in zip(tables, sources, strict=True):
        if isinstance(source.store, CachedStore | NgramCache):
            orders = sorted(set(table.orders))
            for (space, number), counts in source.store.counts().items():
                if space == table.space:
                    order = orders[number] + 2 if isinstance(source.store, NgramCache) else 0
                    found.setdefault((table.layer, order), Counter()).update(counts)
    return {place: dict(counts) for place, counts in found.items()}


class CachedReads(TouchedRows):
    """As :class:`TouchedRows`, for a source whose store is an :class:`NgramCache`, and for reading only.

    :meth:`fetch` begins a read, :meth:`expand_all` finishes it; one that is not to be finished is abandoned.
    """

    def __init__(self, table: Table, source: Source):
        super().__init__(table, source)
        assert isinstance(source.store, NgramCache), "reads of n-grams want a cache of n-grams"
        self._cache = source.store
        self._begun: Begun | None = None
        self._orders = slice(table.orders[0], table.orders[-1] + 1)  # they follow each other, as the columns do

    def fetch(self, lookups: Sequence[tuple[Tensor, Tensor]], live: Sequence[Tensor | None]) -> None:
        """Begin to read every micro-batch's (mixes ``[B, T, N-1]``, rows ``[B, T, C]``) where they are live."""
        self.shapes = [rows.shape[:2] for _, rows in lookups]
        self._live = [None if mask is None else mask.flatten() for mask in live]
        mixes = _joined([mix[..., self._orders] for mix, _ in lookups])
        self._rows = _joined([rows[..., self.table.columns] for _, rows in lookups])
        self._begun = self._cache.begin((self.table.space,), mixes[None], self._rows[None])

    def expand_all(self, outs: Sequence[Tensor]) -> None:
        """See :meth:`TouchedRows.expand_all`."""
        begun, self._begun = self._begun, None
        assert begun is not None, "fetch comes before expand_all"
        positions = [out.view(1, -1, self.width) for out in outs]
        self._cache.finish(begun, positions)
        for out, live in zip(positions, self._live, strict=True):
            if live is not None:
                out.masked_fill_(~live[:, None], 0)

    def abandon(self) -> None:
        """See :meth:`TouchedRows.abandon`."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self._cache.abandon(begun)

    @property
    def device(self) -> torch.device:
        """See :class:`TouchedRows`."""
        return self._rows.device

    @property
    def distinct(self) -> int:
        """See :class:`TouchedRows`."""
        parts = self._rows.split([batch * length for batch, length in self.shapes])
        rows = [part if live is None else part[live] for part, live in zip(parts, self._live, strict=True)]
        return len(unique_rows(torch.cat(rows).flatten())[0])

    def catch_up(self, expanded: Sequence[Tensor]) -> None:
        """Nothing: a memory that is only read has no writes."""
        self.release()

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """See :meth:`TouchedRows.used_on`."""
        for tensor in (self._rows, *self._live):
            if tensor is not None:
                tensor.record_stream(stream)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Positions of all micro-batches one after the other: ``[n, ...]``."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
