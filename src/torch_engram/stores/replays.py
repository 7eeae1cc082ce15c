"""Reads of a few positions on a GPU, recorded once as CUDA graphs and replayed: what a launch costs is paid once.

Everything has its place: rows come from where ``addressed`` leaves them, and go to ``out``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_engram.stores.embedding import Columns, embed
from torch_engram.stores.loaded import LoadedStore
from torch_engram.stores.ngram_cache import NgramCache

Addressed = Callable[[], tuple[Tensor, Tensor]]
"""Enqueues what finds the mixes ``[S, n, orders]`` and row ids ``[S, n, C]`` of a read, and may be captured."""


_MODE = "thread_local"
"""Other threads go on while this one records."""


class CachedReplay:
    """A read of ``spaces`` of a cache, into ``out`` ``[S, n, C·dim]``.

    Where the device brings all that can be missing by itself, one graph does everything, and nobody waits. Otherwise
    there are three: what looks for the rows, what the device brings of those that are missing while the host brings
    the others, and what puts them in place. ``addressed`` is called twice, and every :meth:`run` goes on from there.
    """

    def __init__(self, cache: NgramCache, spaces: Sequence[int], addressed: Addressed, out: Tensor):
        self._cache, self._spaces = cache, tuple(spaces)
        mixes, rows = addressed()
        cache.read(self._spaces, mixes, rows, out)  # compiles the kernels, and pins the table
        self._ask = cache.new_ask(rows.numel())
        own = self._ask.records
        self._fetched = cache.layout.empty(rows.numel(), cache.device) if own is None else own
        torch.cuda.synchronize(cache.device)
        self._graphs = [torch.cuda.CUDAGraph()]
        with torch.cuda.graph(self._graphs[0], capture_error_mode=_MODE):
            mixes, rows = addressed()
            self._found, columns = cache.find(self._spaces, mixes, rows)
            self._ask.send(self._found.keys, self._found.count)
            if self._ask.alone:
                self._ask.read()
                self._fill(columns, out)
        if not self._ask.alone:
            self._graphs += [self._captured(self._ask.read), self._captured(lambda: self._fill(columns, out))]

    def _captured(self, launches: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graphs[0].pool(), capture_error_mode=_MODE):
            launches()
        return graph

    def _fill(self, columns: Columns, out: Tensor) -> None:
        self._cache.slots.fill(self._found, self._fetched)
        embed(self._cache.layout, self._cache.slots.records, self._fetched, self._found.where, columns, out)

    def run(self) -> None:
        """Read anew, on the current stream. Raises what the store's ``fetch`` does."""
        cache = self._cache
        if self._ask.alone:
            with cache.line.alone():
                cache.slots.tick()
                self._graphs[0].replay()
            return
        with cache.line.join() as number:
            cache.slots.tick()
            self._graphs[0].replay()
            self._ask.sent()
            self._graphs[1].replay()
        try:
            records = self._ask.bring()
            if self._ask.records is None:
                self._fetched[: len(records)].copy_(records)
        except BaseException as error:
            with cache.line.head(number):
                cache.spoil(self._found, error)
            raise
        with cache.line.head(number):
            cache.require_unspoiled(number, self._found)
            self._graphs[2].replay()


class LoadedReplay:
    """A read of ``spaces`` of a table in the device's memory, into ``out`` ``[S, n, C·dim]``: always one graph.

    ``first_rows``: of every space the row id, as addressing numbers them, of its row 0.
    """

    def __init__(
        self, store: LoadedStore, spaces: Sequence[int], first_rows: Sequence[int], addressed: Addressed, out: Tensor
    ):
        begins = [store.table.span(space).start - first for space, first in zip(spaces, first_rows, strict=True)]
        offsets = torch.tensor(begins, device=store.table.device)[:, None, None]
        _, rows = addressed()
        columns = Columns.of((1,) * rows.shape[-1], store.table.device)

        def launches() -> None:
            _, rows = addressed()
            where = (rows + offsets).flatten()
            embed(store.layout, store.table.records, store.table.records[:0], where, columns, out)

        launches()  # compiles the kernels
        torch.cuda.synchronize(store.table.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode=_MODE):
            launches()

    def run(self) -> None:
        """Read anew, on the current stream."""
        self._graph.replay()
