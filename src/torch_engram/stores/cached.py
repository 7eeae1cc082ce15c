"""A cache by row in the memory of the device that computes, in front of any store, for memories that are written.

By row, because a write names rows: one row may be read by any number of n-grams, whose entries a write could not find.
A memory that is only read has :mod:`torch_engram.stores.ngram_cache`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_engram.sizes import parse_size
from torch_engram.stores.protocol import Store, WritableStore
from torch_engram.stores.slots import COUNTS, Found, Reads, Region, Slots
from torch_engram.stores.turns import Turns


class Front:
    """What stands in front of a store and is one itself. Raises ``ValueError`` for a store that is a cache already."""

    grouped = False

    def __init__(self, store: Store):
        if store.grouped:
            raise ValueError(f"{type(store).__name__} keeps n-grams together by itself: leave out the cache.")
        self.store, self.layout, self.spaces = store, store.layout, store.spaces


class WritableFront(Front):
    """What a front of a writable store passes on."""

    store: WritableStore

    @property
    def acknowledged(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.store.acknowledged

    @property
    def counts_from(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.store.counts_from

    def wait(self, epoch: int) -> None:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        self.store.wait(epoch)

    def flush(self) -> None:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        self.store.flush()

    def changed(self, space: int) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.store.changed(space)

    def written(self, space: int) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.store.written(space)

    def forget_changes(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.store.forget_changes()


def counted(slots: Slots) -> dict[tuple[int, int], dict[str, int]]:
    """What a cache has counted, by (space, order): :data:`~torch_engram.stores.slots.COUNTS`. Waits for the device."""
    lines = zip(slots.regions, slots.counts.tolist(), strict=True)
    return {(region.space, region.order): dict(zip(COUNTS, line, strict=True)) for region, line in lines}


class CachedStore(Front):
    """``store`` behind a cache of ``budget`` bytes, a number or such as ``"8GB"``, on ``device``.

    Keys on another device pass it by. Every space has an equal share. Raises ``ValueError`` for a budget that is none
    or too small.
    """

    def __init__(self, store: Store, budget: int | str, device: torch.device | str):
        super().__init__(store)
        self.device = torch.device(device)
        regions = [Region(space) for space in self.spaces]
        self._slots = Slots(regions, self.layout.nbytes, parse_size(budget), self.device)
        self._by_space = torch.zeros(max(self.spaces) + 1, dtype=torch.int64)
        self._by_space[list(self.spaces)] = torch.arange(len(regions))
        self._by_space = self._by_space.to(self.device)
        self._turns, self._reading = Turns(self.device), threading.Lock()

    def counts(self) -> dict[tuple[int, int], dict[str, int]]:
        """What was counted since the beginning, by (space, 0), in reads of one row: ``hits``, ``misses``, and those
        that another read of the same fetch had brought, ``repeats``; of the misses, ``evictions`` and ``overflow``."""
        return counted(self._slots)

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.Store`."""
        if keys.device.type != self.device.type:
            return self.store.fetch(keys)
        reads = self._reads(keys)
        with self._reading:  # a fetch does not find what another has claimed and not brought yet
            with self._turns.turn():
                self._slots.tick()
                found = self._slots.find(reads)
                found = found.first(int(found.count[0]))
                self._begin_fetch()
            try:
                fetched = self.store.fetch(found.keys)  # others may write meanwhile
                with self._turns.turn():
                    self._slots.fill(found, self._up_to_date(found, fetched))
                    return self._slots.collect(found.where, fetched)
            except BaseException:
                with self._turns.turn():
                    self._slots.release(found)
                raise

    def _reads(self, keys: Tensor) -> Reads:
        keys = keys.contiguous()
        return Reads(keys, keys[:, None], self._slots.plan(), 1, max(1, len(keys)), self._by_space)

    def _begin_fetch(self) -> None:
        """A fetch from the store follows."""

    def _up_to_date(self, found: Found, fetched: Tensor) -> Tensor:
        """What was fetched, as it is now."""
        return fetched


@dataclass(frozen=True)
class _Write:
    epoch: int
    keys: Tensor  # int64 [U]
    records: Tensor  # uint8 [U, nbytes], not changed after the write

    def lay_over(self, keys: Tensor, records: Tensor) -> None:
        """Replace the ``records`` of those ``keys`` that were written."""
        for tensor in (self.keys, self.records):
            if tensor.is_cuda:  # written on another stream, which may be done with it before this one
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        ordered, order = self.keys.sort()
        at = torch.searchsorted(ordered, keys).clamp_(max=len(ordered) - 1)
        hit = ordered[at] == keys
        torch.where(hit[:, None], self.records[order[at]], records, out=records)


class WritableCachedStore(WritableFront, CachedStore):
    """A :class:`CachedStore` over a writable store.

    A write replaces the rows that the cache holds before anyone can fetch them again. What is being fetched from the
    store at the time, or was fetched before the store had carried a write out, is brought up to date before it enters
    the cache: its rows are those of the newest write always.
    """

    def __init__(self, store: WritableStore, budget: int | str, device: torch.device | str):
        CachedStore.__init__(self, store, budget, device)
        self._writes: list[_Write] = []
        """Those that the store had not carried out when the fetch under way began, or the last one."""
        self._seen = 0
        """The epoch that this fetch sees."""

    def write(self, keys: Tensor, records: Tensor) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        if keys.device.type != self.device.type:
            keys, records = keys.to(self.device), records.to(self.device)
        with self._turns.turn():
            epoch = self.store.write(keys, records)
            if len(keys):
                self._writes.append(_Write(epoch, keys, records))
                self._slots.overwrite(self._reads(keys), records)
            if not self._reading.locked():
                self._seen = self.store.acknowledged
            self._forget()
        return epoch

    def _begin_fetch(self) -> None:
        self._seen = self.store.acknowledged
        self._forget()

    def _forget(self) -> None:
        self._writes = [write for write in self._writes if write.epoch > self._seen]

    def _up_to_date(self, found: Found, fetched: Tensor) -> Tensor:
        if len(fetched):
            for write in self._writes:
                write.lay_over(found.keys, fetched)
        return fetched


def cached(store: Store, budget: int | str, device: torch.device | str) -> CachedStore:
    """``store`` behind a :class:`CachedStore`, writable where it is."""
    if isinstance(store, WritableStore):
        return WritableCachedStore(store, budget, device)
    return CachedStore(store, budget, device)
