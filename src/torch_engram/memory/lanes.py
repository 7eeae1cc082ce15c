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
from torch_engram.memory.cached_reads import CachedReads
from torch_engram.memory.plain_reads import by_layer
from torch_engram.memory.tables import Table
from torch_engram.memory.tokens import Tokens
from torch_engram.stores import NgramCache
from torch_engram.stores.line import UNDER_WAY
from torch_engram.stores.pinned import pinned
from torch_engram.stores.replays import CachedReplay

SEEN = 3
"""Prefetches of a shape after which it is recorded."""
Kind = tuple[int, int, bool]
"""B and T of ids, and whether they are on the device."""
SHAPES = 2
"""Kinds that are recorded, at most: what is recorded of one holds as much memory as its largest reads could miss."""


class Lane:
    """One prefetch after another of ids ``[B, T]``, which are given on the device, or all on the host."""

    def __init__(self, addressing: Addressing, tables: Sequence[Table], cache: NgramCache, kind: Kind):
        self.kind, self._addressing, device = kind, addressing, cache.device
        batch, length, self._on_device = kind
        self._inputs = torch.zeros(9 * batch * length, dtype=torch.uint8, device=device)
        self._staged = pinned(tuple(self._inputs.shape), torch.uint8, device).zero_()
        self._ids, self._start = _parts(self._inputs, batch, length)
        self._dead = torch.zeros_like(self._start)
        self._given = (self._ids, self._start) if self._on_device else _parts(self._staged, batch, length)
        self._stranger = pinned((1,), torch.bool, device).zero_()
        self._strange = self._stranger.numpy()  # the same byte
        self._placed = torch.cuda.Event()
        self._replay = CachedReplay(cache, [table.space for table in tables], self._addressed)
        self._values = len(tables[0].orders) * tables[0].dim

    @property
    def alone(self) -> bool:
        """Whether nobody has to wait for what has begun before it is placed."""
        return self._replay.alone and not self._on_device

    def _addressed(self) -> tuple[Tensor, Tensor]:
        if not self._on_device:
            self._inputs.copy_(self._staged, non_blocking=True)
        found = self._addressing.rows_at_once(self._ids, self._start, self._dead, 0, self._stranger)
        mixes, rows = (part.flatten(1, 2) for part in found)
        return mixes, rows

    def begin(self, tokens: Tokens) -> None:
        """Look for what these tokens read, on the current stream. Raises ``ValueError`` for an id on the host that is
        outside the vocabulary."""
        if not self._on_device:
            self._addressing.require_known(tokens.ids)
            self._replay.wait_until_found()  # what was staged before has been copied
        self._placed.wait()
        ids, start = self._given
        ids.copy_(tokens.ids)
        if tokens.doc_start is None:
            start.zero_()
        else:
            start.copy_(tokens.doc_start)
        for given in _on_device(tokens):
            given.record_stream(torch.cuda.current_stream(given.device))
        self._tokens = tokens
        self._replay.begin()

    def bring(self) -> None:
        """Have the host bring what is missing. Raises what the store's ``fetch`` does."""
        if self._on_device:
            self._replay.wait_until_found()
        self._replay.bring()

    def place(self, layers: int, dtype: torch.dtype) -> Tensor:
        """The embeddings ``[L, B·T, E]``. Raises what the store's ``fetch`` did for a read before this one, and
        ``ValueError`` for an id outside the vocabulary where ids are on the device."""
        try:
            out = torch.empty(layers, self._ids.numel(), self._values, dtype=dtype, device=self._ids.device)
        except BaseException as error:  # later reads would wait for this one
            self._replay.abandon(error)
            raise
        self._replay.place(out)
        self._placed.record()
        if self._on_device and self._strange[0]:
            self._strange[0] = False
            self._addressing.require_known(self._tokens.ids)
        return out


def _parts(inputs: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids int64 and document starts bool, both ``[B, T]``, in one piece of bytes."""
    ids, start = inputs.split((8 * batch * length, batch * length))
    return ids.view(torch.int64).view(batch, length), start.view(torch.bool).view(batch, length)


def kind_of(tokens: Tokens) -> Kind:
    """What a lane has to be for these."""
    batch, length = tokens.ids.shape
    return batch, length, tokens.ids.is_cuda


def _on_device(tokens: Tokens) -> list[Tensor]:
    return [given for given in (tokens.ids, tokens.doc_start) if given is not None and given.is_cuda]


class Lanes:
    """The lanes of a bank's prefetches, of every recorded shape as many as may be under way."""

    def __init__(self, addressing: Addressing, tables: Sequence[Table], cache: NgramCache):
        self.addressing, self._tables, self._cache = addressing, tables, cache
        self._seen: Counter[Kind] = Counter()
        self._free: dict[Kind, queue.SimpleQueue[Lane | None]] = {}
        self._lock = threading.Lock()

    def take_in(self, tokens: Tokens) -> bool:
        """Whether tokens like these are recorded, or are to be from now on. Raises ``ValueError`` for ids and masks
        that are not ``[B, T]``, all alike."""
        if tokens.history is not None or tokens.live is not None or not use_kernels(self._cache.slots.tags):
            return False
        self.addressing.require_alike(tokens.ids, tokens.doc_start)
        kind = kind_of(tokens)
        with self._lock:
            if kind not in self._free and len(self._free) < SHAPES and tokens.ids.numel():
                self._seen[kind] += 1
                if self._seen[kind] >= SEEN:
                    self._free[kind] = queue.SimpleQueue()
                    for _ in range(UNDER_WAY):
                        self._free[kind].put(None)  # made when it is needed
            return kind in self._free

    def take(self, kind: Kind) -> Lane:
        """A lane that nobody has; waits for one."""
        lane = self._free[kind].get()
        try:
            return Lane(self.addressing, self._tables, self._cache, kind) if lane is None else lane
        except BaseException:
            self._free[kind].put(None)
            raise

    def give_back(self, lane: Lane) -> None:
        """All that the lane had to enqueue is enqueued."""
        self._free[lane.kind].put(lane)


class LaneFetch:
    """One prefetch in a lane; ``tables``: every layer's one. See :class:`~torch_engram.memory.prefetching.Fetch`."""

    def __init__(self, lanes: Lanes, tables: Sequence[CachedReads], tokens: Tokens, dtype: torch.dtype):
        self._lanes, self._tables, self._tokens, self._dtype = lanes, tables, tokens, dtype
        device = tables[0].device
        self._now = torch.cuda.current_stream(device).record_event() if _on_device(tokens) else None

    def begin(self) -> None:
        """See :class:`~torch_engram.memory.prefetching.Fetch`."""
        if self._now is not None:
            torch.cuda.current_stream(self._tables[0].device).wait_event(self._now)
        for reads in self._tables:
            reads.keep(partial(self._rows, reads.table.layer), None)
        self._lane = self._lanes.take(kind_of(self._tokens))
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
        return by_layer([reads.table.layer for reads in self._tables], whole, [self._lane.kind[:2]])

    def _rows(self, layer: int) -> Tensor:
        addressing = self._lanes.addressing
        ids = self._tokens.ids.to(self._tables[0].device)
        return addressing.lookup(ids, doc_start=self._tokens.doc_start)(layer)[1].flatten(0, 1)
