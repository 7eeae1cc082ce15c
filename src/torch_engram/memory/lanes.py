"""Prefetches of a shape that comes again and again, such as chunks of a prompt: recorded once and then replayed, so
that they take little of the host's time."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from torch_engram.addressing import Addressing
from torch_engram.kernels import use_kernels
from torch_engram.memory.cached_reads import CachedReads, by_layer
from torch_engram.memory.tables import Table
from torch_engram.memory.tokens import Tokens
from torch_engram.stores import NgramCache
from torch_engram.stores.line import UNDER_WAY
from torch_engram.stores.pinned import pinned
from torch_engram.stores.replays import CachedReplay

SEEN = 3
"""Prefetches of a shape after which it is recorded."""
SHAPES = 2
"""Shapes that are recorded, at most: what is recorded of one holds as much memory as its largest reads could miss."""


class Lane:
    """One prefetch after another of ids ``[B, T]``."""

    def __init__(self, addressing: Addressing, tables: Sequence[Table], cache: NgramCache, shape: tuple[int, int]):
        self.shape, self._addressing, device = shape, addressing, cache.device
        self._ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self._start = torch.zeros(shape, dtype=torch.bool, device=device)
        self._dead = torch.zeros_like(self._start)
        self._from_host = [pinned(shape, tensor.dtype, device) for tensor in (self._ids, self._start)]
        self._stranger = pinned((1,), torch.bool, device).zero_()
        self._strange = self._stranger.numpy()  # the same byte
        self._copied, self._placed = torch.cuda.Event(), torch.cuda.Event()
        self._replay = CachedReplay(cache, [table.space for table in tables], self._addressed)
        self._values = len(tables[0].orders) * tables[0].dim

    @property
    def alone(self) -> bool:
        """Whether nobody has to wait for what has begun before it is placed."""
        return self._replay.alone and not self._given.is_cuda

    def _addressed(self) -> tuple[Tensor, Tensor]:
        found = self._addressing.rows_at_once(self._ids, self._start, self._dead, 0, self._stranger)
        mixes, rows = (part.flatten(1, 2) for part in found)
        return mixes, rows

    def begin(self, tokens: Tokens) -> None:
        """Look for what these tokens read, on the current stream. Raises ``ValueError`` for an id on the host that is
        outside the vocabulary."""
        if not tokens.ids.is_cuda:
            self._addressing.require_known(tokens.ids)
        self._copied.synchronize()
        self._placed.wait()
        self._place(tokens.ids, self._ids, self._from_host[0])
        if tokens.doc_start is None:
            self._start.zero_()
        else:
            self._place(tokens.doc_start, self._start, self._from_host[1])
        self._copied.record()
        self._given = tokens.ids
        self._replay.begin()

    def bring(self) -> None:
        """Have the host bring what is missing. Raises what the store's ``fetch`` does."""
        if self._given.is_cuda:
            self._replay.wait_until_found()
        self._replay.bring()

    def place(self, layers: int, dtype: torch.dtype) -> Tensor:
        """The embeddings ``[L, B·T, E]``. Raises what the store's ``fetch`` did for a read before this one, and
        ``ValueError`` for an id outside the vocabulary where ids are on the device."""
        positions = self.shape[0] * self.shape[1]
        try:
            out = torch.empty(layers, positions, self._values, dtype=dtype, device=self._ids.device)
        except BaseException as error:  # later reads would wait for this one
            self._replay.abandon(error)
            raise
        self._replay.place(out)
        self._placed.record()
        if self._given.is_cuda and self._strange[0]:
            self._strange[0] = False
            self._addressing.require_known(self._given)
        return out

    def _place(self, given: Tensor, target: Tensor, from_host: Tensor) -> None:
        if given.is_cuda:
            given.record_stream(torch.cuda.current_stream(target.device))
            target.copy_(given)
        else:
            target.copy_(from_host.copy_(given), non_blocking=True)


class Lanes:
    """The lanes of a bank's prefetches, of every recorded shape as many as may be under way."""

    def __init__(self, addressing: Addressing, tables: Sequence[Table], cache: NgramCache):
        self.addressing, self._tables, self._cache = addressing, tables, cache
        self._seen: Counter[tuple[int, int]] = Counter()
        self._free: dict[tuple[int, int], queue.SimpleQueue[Lane | None]] = {}
        self._lock = threading.Lock()

    def take_in(self, tokens: Tokens) -> bool:
        """Whether tokens like these are recorded, or are to be from now on. Raises ``ValueError`` for ids and masks
        that are not ``[B, T]``, all alike."""
        if tokens.history is not None or tokens.live is not None or not use_kernels(self._cache.slots.tags):
            return False
        self.addressing.require_alike(tokens.ids, tokens.doc_start)
        shape = (tokens.ids.shape[0], tokens.ids.shape[1])
        with self._lock:
            if shape not in self._free and len(self._free) < SHAPES and shape[0] * shape[1]:
                self._seen[shape] += 1
                if self._seen[shape] >= SEEN:
                    self._free[shape] = queue.SimpleQueue()
                    for _ in range(UNDER_WAY):
                        self._free[shape].put(None)  # made when it is needed
            return shape in self._free

    def take(self, shape: tuple[int, int]) -> Lane:
        """A lane that nobody has; waits for one."""
        lane = self._free[shape].get()
        try:
            return Lane(self.addressing, self._tables, self._cache, shape) if lane is None else lane
        except BaseException:
            self._free[shape].put(None)
            raise

    def give_back(self, lane: Lane) -> None:
        """All that the lane had to enqueue is enqueued."""
        self._free[lane.shape].put(lane)


class LaneFetch:
    """One prefetch in a lane; ``tables``: every layer's one. See :class:`~torch_engram.memory.prefetching.Fetch`."""

    def __init__(self, lanes: Lanes, tables: Sequence[CachedReads], tokens: Tokens, dtype: torch.dtype):
        self._lanes, self._tables, self._tokens, self._dtype = lanes, tables, tokens, dtype
        self._shape = (tokens.ids.shape[0], tokens.ids.shape[1])
        device = tables[0].device
        self._now = torch.cuda.current_stream(device).record_event() if tokens.ids.is_cuda else None

    def begin(self) -> None:
        """See :class:`~torch_engram.memory.prefetching.Fetch`."""
        if self._now is not None:
            torch.cuda.current_stream(self._tables[0].device).wait_event(self._now)
        for reads in self._tables:
            reads.keep(partial(self._rows, reads.table.layer), None)
        self._lane = self._lanes.take(self._shape)
        try:
            self._lane.begin(self._tokens)
        except BaseException:
            self._lanes.give_back(self._lane)
            raise

    @property
    def alone(self) -> bool:
        """See :class:`~torch_engram.memory.prefetching.Fetch`."""
        return self._lane.alone

    def bring(self) -> None:
        """See :class:`~torch_engram.memory.prefetching.Fetch`."""
        try:
            self._lane.bring()
        except BaseException:
            self._lanes.give_back(self._lane)
            raise

    def place(self) -> dict[int, list[Tensor]]:
        """See :class:`~torch_engram.memory.prefetching.Fetch`."""
        try:
            whole = self._lane.place(len(self._tables), self._dtype)
        finally:
            self._lanes.give_back(self._lane)
        return by_layer([reads.table.layer for reads in self._tables], whole, [self._shape])

    def _rows(self, layer: int) -> Tensor:
        addressing = self._lanes.addressing
        ids = self._tokens.ids.to(self._tables[0].device)
        return addressing.lookup(ids, doc_start=self._tokens.doc_start)(layer)[1].flatten(0, 1)
