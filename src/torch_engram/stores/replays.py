"""Reads on a GPU of always as many positions, recorded once as CUDA graphs and replayed: launches are paid for once.

Everything has its place: rows come from where ``addressed`` leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_engram.stores.embedding import embed
from torch_engram.stores.loaded import LoadedStore
from torch_engram.stores.ngram_cache import NgramCache

Addressed = Callable[[], tuple[Tensor, Tensor]]
"""Enqueues what finds the mixes ``[S, n, orders]`` and row ids ``[S, n, C]`` of a read, and may be captured."""


def record(launches: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """What ``launches`` enqueues, to be replayed. Other threads go on meanwhile, and may record graphs themselves: the
    device is not waited for, as torch's own context would."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            launches()
        finally:
            graph.capture_end()
    return graph


class CachedReplay:
    """A read of ``spaces`` of a cache, ``n`` positions each.

    Three graphs: what looks for the rows, what the device brings by itself of those that are missing while the host
    brings the others, and what puts them in the cache. ``addressed`` is called twice, and every read goes on from
    there. ``out``: ``[S, n, C·dim]``, where every read goes to; without it :meth:`place` is told. With it, and where
    the device brings all that can be missing, one graph does everything, and nobody waits. A read begins, on the
    device, after the one before it is placed.
    """

    def __init__(self, cache: NgramCache, spaces: Sequence[int], addressed: Addressed, out: Tensor | None = None):
        self._cache, self._spaces, self._addressed, self._out = cache, tuple(spaces), addressed, out
        mixes, rows = addressed()
        values = rows.shape[-1] * cache.layout.plane("value").width
        trial = out if out is not None else torch.empty(*rows.shape[:2], values, device=cache.device)
        cache.read(self._spaces, mixes, rows, trial)  # compiles the kernels, and pins the table
        self._ask = cache.new_ask(rows.numel())
        own = self._ask.records
        self._fetched = cache.layout.empty(rows.numel(), cache.device) if own is None else own
        self._is_one = out is not None and self._ask.alone
        torch.cuda.current_stream(cache.device).synchronize()
        self._look = record(self._looks)
        if not self._is_one:
            self._read = record(self._ask.read, self._look.pool()) if self._ask.reads else None
            self._fill = record(self._fills, self._look.pool())

    @property
    def alone(self) -> bool:
        """Whether the host has nothing to bring."""
        return self._ask.alone

    def _looks(self) -> None:
        mixes, rows = self._addressed()
        self._found, self._columns = self._cache.find(self._spaces, mixes, rows)
        self._ask.send(self._found.keys, self._found.count)
        if self._is_one:
            self._ask.place(self._cache.slots, self._found)
            self._embeds(self._out)

    def _fills(self) -> None:
        self._cache.slots.fill(self._found, self._fetched)
        if self._out is not None:
            self._embeds(self._out)

    def _embeds(self, out: Tensor | None) -> None:
        assert out is not None
        cache = self._cache
        embed(cache.layout, cache.slots.records, self._fetched, self._found.where, self._columns, out)

    def run(self, stream: torch.cuda.Stream) -> None:
        """Read anew into ``out``, on ``stream``, which is the current one. Raises what :meth:`bring` and :meth:`place`
        do."""
        if self._is_one:
            with self._cache.line.alone(stream):
                self._ask.check()
                self._cache.slots.tick()
                self._look.replay()
        else:
            self.begin()
            self.bring()
            self.place()

    def begin(self) -> None:
        """Look for the rows of a read."""
        with self._cache.line.join() as self._number:
            self._cache.slots.tick()
            self._look.replay()
            try:
                self._ask.sent()
                if self._read is not None:
                    with self._ask.beside():
                        self._read.replay()
            except BaseException:
                self._cache.slots.release(self._found)
                raise

    def wait_until_found(self) -> None:
        """Return when the device has looked for what has begun. Raises what the store's ``fetch`` does."""
        self._ask.wait()

    def bring(self) -> None:
        """Have the host bring what is missing. Raises what the store's ``fetch`` does."""
        try:
            records = self._ask.bring()
            if self._ask.records is None:
                self._fetched[: len(records)].copy_(records)
        except BaseException as error:
            self.abandon(error)
            raise

    def abandon(self, error: BaseException) -> None:
        """Give up a read that has begun, for ``error``; those that have begun since fail for it, too."""
        with self._cache.line.head(self._number):
            self._cache.spoil(self._found, error)

    def place(self, out: Tensor | None = None) -> None:
        """Fill ``out`` with what was brought. Raises what the store's ``fetch`` did for a read before this one."""
        with self._cache.line.head(self._number):
            self._cache.require_unspoiled(self._number, self._found)
            self._fill.replay()
            if out is not None:
                self._embeds(out)


class LoadedReplay:
    """A read of ``spaces`` of a table in the device's memory, into ``out`` ``[S, n, C·dim]``: always one graph.

    ``first_rows``: of every space the row id, as addressing numbers them, of its row 0.
    """

    def __init__(
        self, store: LoadedStore, spaces: Sequence[int], first_rows: Sequence[int], addressed: Addressed, out: Tensor
    ):

        def launches() -> None:
            _, rows = addressed()
            store.read(spaces, first_rows, rows, out)

        launches()  # compiles the kernels
        torch.cuda.current_stream(store.table.device).synchronize()
        self._graph, self._launches = record(launches), launches
        """The second holds what the first one reads."""

    def run(self, stream: torch.cuda.Stream) -> None:
        """Read anew, on ``stream``, which is the current one."""
        self._graph.replay()
