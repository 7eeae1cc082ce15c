"""The reads of a memory that is only read, through caches by n-gram: no row is sorted out or held.

What addressing gives goes in, embeddings come out (:class:`~torch_engram.stores.ngram_cache.NgramCache`). And what
caches have counted, as a bank names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from torch_engram.memory.lookups import Lookups
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
    """As :class:`TouchedRows`, for a source whose store is an :class:`NgramCache`, and for reading only: what it needs
    no rows for. :class:`CachedFetch` reads."""

    def __init__(self, table: Table, source: Source):
        super().__init__(table, source)
        assert isinstance(source.store, NgramCache), "reads of n-grams want a cache of n-grams"
        self.cache = source.store
        self.orders = slice(table.orders[0], table.orders[-1] + 1)  # they follow each other, as the columns do

    def keep(self, rows: Callable[[], Tensor], live: Tensor | None) -> None:
        """What gives the rows that are read, int64 ``[n, c]``, where they are live, bool ``[n]``."""
        self._rows, self._live = rows, live

    @property
    def device(self) -> torch.device:
        """See :class:`TouchedRows`."""
        return self.cache.device

    @property
    def distinct(self) -> int:
        """See :class:`TouchedRows`."""
        rows = self._rows() if self._live is None else self._rows()[self._live]
        return len(unique_rows(rows.flatten())[0])

    def catch_up(self, expanded: Sequence[Tensor]) -> None:
        """Nothing: a memory that is only read has no writes."""
        self.release()

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """See :meth:`TouchedRows.used_on`."""
        if self._live is not None:
            self._live.record_stream(stream)


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
        self._lookups, self._masks, self._device = lookups, live, tables[0].device
        self._dtype, self._layers = dtype, list(dict.fromkeys(reads.table.layer for reads in tables))
        per_layer = len(tables) // len(self._layers)
        self._groups = [tables[first::per_layer] for first in range(per_layer)]
        """Tables of all layers that have the same columns."""
        self._begun: list[tuple[NgramCache, Begun]] = []
        self._brought: list[Tensor] = []

    alone = False
    """What has begun shares a stream with what is placed."""

    def begin(self) -> None:
        """See :class:`~torch_engram.memory.prefetching.Fetch`."""
        found = self._lookups.result()
        found.wait()
        self._found = [lookup.of(self._layers) for lookup in found.batches]  # kept until it has been read
        self._shapes = [(rows.shape[1], rows.shape[2]) for _, rows in self._found]
        mixes, rows = (_joined(parts) for parts in zip(*self._found, strict=True))
        self._live = None if all(mask is None for mask in self._masks) else self._mask()
        try:
            for tables in self._groups:
                first = tables[0]
                own = rows[..., first.table.columns]
                for reads, of_layer in zip(tables, own, strict=True):
                    reads.keep(partial(_same, of_layer), self._live)
                spaces = [reads.table.space for reads in tables]
                begun = first.cache.begin(spaces, mixes[..., first.orders], own)
                self._begun.append((first.cache, begun))
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
        positions = sum(batch * length for batch, length in self._shapes)
        widths = [tables[0].width for tables in self._groups]
        try:
            whole = torch.empty(len(self._layers), positions, sum(widths), dtype=self._dtype, device=self._device)
            for fetched, out in zip(self._brought, whole.split(widths, -1), strict=True):
                cache, begun = self._begun.pop(0)
                cache.place(begun, fetched, out)
        except BaseException as error:
            self._abandon(error)
            raise
        if self._live is not None:
            whole.masked_fill_(~self._live[:, None], 0)
        self._found = []
        return by_layer(self._layers, whole, self._shapes)

    def _mask(self) -> Tensor:
        masks = zip(self._masks, self._shapes, strict=True)
        return torch.cat([
            (torch.ones(shape, dtype=torch.bool) if mask is None else mask).flatten().to(self._device)
            for mask, shape in masks
        ])  # fmt: skip

    def _abandon(self, error: BaseException) -> None:
        """Caches whose reads have begun wait no longer."""
        for cache, begun in self._begun:
            cache.abandon(begun, error)


def by_layer(layers: Sequence[int], whole: Tensor, shapes: Sequence[tuple[int, int]]) -> dict[int, list[Tensor]]:
    """Embeddings ``[L, n, E]`` of positions of all micro-batches as every layer's ``[B, T, E]`` of each."""
    positions = [batch * length for batch, length in shapes]
    return {
        layer: [part.view(*shape, -1) for part, shape in zip(own.split(positions), shapes, strict=True)]
        for layer, own in zip(layers, whole, strict=True)
    }


def _same(rows: Tensor) -> Tensor:
    return rows


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Positions of all micro-batches one after the other: ``[L, n, ...]``."""
    flat = [part.flatten(1, 2) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)
