"""A store as a bank uses it: with the format of its records, and with the writes that a fetch may have missed.

A fetch sees all writes that the store had acknowledged when it began. Every later one is kept here until no fetch that
is still in use began before it, and is laid over the fetched rows when they are first needed. So a row that was
prefetched any number of steps ahead is exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from torch_engram.stores import DecodedRows, RowFormat, Store, WritableStore


@dataclass(frozen=True)
class _Write:
    epoch: int
    space: int
    keys: Tensor  # int64 [U], ascending
    records: Tensor  # uint8 [U, nbytes], on a GPU the rows' own: nobody changes them after the write
    done: torch.cuda.Event | None

    def use(self) -> None:
        """Let the current stream wait for the records, and keep their memory until it is done with them."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.keys.device)
            stream.wait_event(self.done)
            self.keys.record_stream(stream)
            self.records.record_stream(stream)


class Source:
    """One store and its recent writes. Reads may begin and end on any thread; all else runs on the one that trains."""

    def __init__(self, store: Store, row_format: RowFormat):
        self.store, self.format = store, row_format
        self.newest = 0
        """Epoch of the last write."""
        self._writes: list[_Write] = []
        self._readers: dict[int, int] = {}  # fetches in use, by the epoch that each began at
        self._ended: deque[int] = deque()
        """Epochs of fetches that are in use no more, and still counted in ``_readers``."""
        self._counting = Lock()

    def begin_read(self) -> int:
        """A fetch is about to begin: the epoch up to which it will see every write."""
        with self._counting:
            epoch = self.store.acknowledged if isinstance(self.store, WritableStore) else 0
            readers = self._in_use()
            readers[epoch] = readers.get(epoch, 0) + 1
        return epoch

    def wait(self, epoch: int) -> None:
        """Return when that write is in what a fetch reads, or will not be."""
        if isinstance(self.store, WritableStore):
            self.store.wait(epoch)

    def end_read(self, epoch: int) -> None:
        """That fetch has been brought up to date, or given up. Takes no lock: a garbage collector, which gives up what
        nobody holds, calls from within anything, also where this thread has the lock."""
        self._ended.append(epoch)

    @property
    def in_use(self) -> bool:
        """Whether rows were fetched that have not been brought up to date yet."""
        with self._counting:
            return bool(self._in_use())

    def _in_use(self) -> dict[int, int]:
        """Fetches in use by the epoch that each began at; within the lock."""
        with suppress(IndexError):  # of an empty one
            while True:
                epoch = self._ended.popleft()
                self._readers[epoch] -= 1
                if not self._readers[epoch]:
                    del self._readers[epoch]
        return self._readers

    def newer_than(self, epoch: int, space: int) -> bool:
        """Whether there were writes to rows of ``space`` that a fetch at ``epoch`` may have missed."""
        return any(True for _ in self._newer(epoch, space))

    def _newer(self, epoch: int, space: int) -> Iterator[_Write]:
        return (write for write in self._writes if write.epoch > epoch and write.space == space)

    def lay_over(self, rows: DecodedRows, epoch: int, space: int) -> Tensor:
        """Bring rows of ``space`` that were fetched at ``epoch`` up to the newest write; returns which of them were
        written, bool ``[U]``."""
        written = torch.zeros(len(rows.row_keys), dtype=torch.bool, device=rows.row_keys.device)
        for write in self._newer(epoch, space):
            write.use()
            rows.lay_over(write.keys, write.records, written)
        return written

    def write(self, rows: DecodedRows, space: int) -> None:
        """Encode and write rows of ``space``; forget writes that every fetch in use or to come sees."""
        if not len(rows.row_keys):
            return
        assert isinstance(self.store, WritableStore)
        records = rows.encode()
        done = torch.cuda.current_stream(records.device).record_event() if records.is_cuda else None
        self.newest = self.store.write(rows.row_keys, records)
        self._writes.append(_Write(self.newest, space, rows.row_keys, records, done))
        with self._counting:
            seen = min([self.store.acknowledged, *self._in_use()])
        self._writes = [write for write in self._writes if write.epoch > seen]
