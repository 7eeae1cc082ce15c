"""The reads of a memory that is only read, through caches by n-gram
(:class:`~torch_engram.stores.ngram_cache.NgramCache`). And what caches have counted, as a bank names it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import groupby

import torch
from torch import Tensor

from torch_engram.memory.lookups import Lookups
from torch_engram.memory.plain_reads import PlainReads, Positions
from torch_engram.memory.source import Source
from torch_engram.memory.tables import Table
from torch_engram.stores import Begun, CachedStore, Heads, NgramCache, ShardedStore


def heads_of(table: Table) -> Heads:
    """How a table's rows are read."""
    return Heads(table.space, tuple(len(list(run)) for _, run in groupby(table.orders)), table.first_row)


def counts_by_order(tables: Sequence[Table], sources: Sequence[Source]) -> dict[tuple[int, int], dict[str, int]]:
    """What the caches of some tables have counted, by layer and order; order 0 stands for all of a cache by row."""
    found: dict[tuple[int, int], Counter[str]] = {}
    for table, source in zip(tables, sources, strict=True):
        store = source.store.store if isinstance(source.store, ShardedStore) else source.store
        if isinstance(store, CachedStore | NgramCache):
            orders = sorted(set(table.orders))
            for (space, number), counts in store.counts().items():
                if space == table.space:
                    order = orders[number] + 2 if isinstance(store, NgramCache) else 0
                    found.setdefault((table.layer, order), Counter()).update(counts)
    return {place: dict(counts) for place, counts in found.items()}


class CachedReads(PlainReads):
    """Of a source whose store is an :class:`NgramCache`. :class:`CachedFetch` reads."""

    def __init__(self, table: Table, source: Source):
        super().__init__(table, source)
        assert isinstance(source.store, NgramCache), "reads of n-grams want a cache of n-grams"
        self.cache = source.store
        self.orders = slice(table.orders[0], table.orders[-1] + 1)  # they follow each other, as the columns do

    @property
    def device(self) -> torch.device:
        """See :class:`TouchedRows`."""
        return self.cache.device


class CachedFetch:
    """What one prefetch reads of caches: all layers together, since their tables are alike.

    ``tables``: of some layers, each layer's one after the other. ``live``: the micro-batches' masks. See
    :class:`~torch_engram.memory.prefetching.Fetch`.
    """

    def __init__(
        self,
        tables: Sequence[CachedReads],
        lookups: Future[Lookups],
        live: Sequence[Tensor | None],
        dtype: torch.dtype,
    ):
        self._tables, self._lookups, self._live, self._dtype = tables, lookups, live, dtype
        self._begun: list[tuple[NgramCache, Begun]] = []
        self._brought: list[Tensor] = []

    alone = False
    """What has begun shares a stream with what is placed."""

    def begin(self) -> None:
        """See :class:`~torch_engram.memory.prefetching.Fetch`."""
        self._positions = positions = Positions(self._tables, self._lookups.result(), self._live)
        try:
            for tables in positions.groups:
                first = tables[0]
                spaces = [reads.table.space for reads in tables]
                mixes, rows = positions.mixes[..., first.orders], positions.rows[..., first.table.columns]
                self._begun.append((first.cache, first.cache.begin(spaces, mixes, rows)))
        except BaseException as error:
            self._abandon(error)
            raise

    def bring(self) -> None:
        """See :class:`~torch_engram.memory.prefetching.Fetch`."""
        try:
            for cache, begun in self._begun:
                self._brought.append(cache.bring(begun))
        except BaseException as error:
            del self._begun[len(self._brought)]  # its cache has let it go
            self._abandon(error)
            raise

    def place(self) -> dict[int, list[Tensor]]:
        """See :class:`~torch_engram.memory.prefetching.Fetch`."""
        try:
            whole, parts = self._positions.empty(self._dtype)
            for fetched, out in zip(self._brought, parts, strict=True):
                cache, begun = self._begun.pop(0)
                cache.place(begun, fetched, out)
        except BaseException as error:
            self._abandon(error)
            raise
        return self._positions.embeddings(whole)

    def _abandon(self, error: BaseException) -> None:
        """Caches whose reads have begun wait no longer."""
        for cache, begun in self._begun:
            cache.abandon(begun, error)
