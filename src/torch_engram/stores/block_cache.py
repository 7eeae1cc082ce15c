"""Blocks of a working file that were used lately, in memory: rows are read from them and written into them here.

A block is larger than a row, so a write is one of a part of a block: it goes into the block that the fetch before it
has read, and the block goes to the file later, with all that was written into it meanwhile. One thread writes changed
blocks, in the order of the file, many at a time; unchanged ones make room for others, the longest unused first
(a clock with a second chance). Everything is done for many blocks at once.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from torch_engram.stores.block_reads import BLOCK, aligned
from torch_engram.stores.pages import private_memory
from torch_engram.stores.row_reads import Int64s
from torch_engram.stores.working_file import WorkingFile

_WRITTEN = 8192
"""Blocks of one write, at most."""
_NOWHERE, _UNWRITTEN = -1, 0
"""Where a block is that is in the file alone; and one that nobody ever wrote: in the slot that stays zero."""


class BlockCache:
    """``slots`` blocks of ``file``, one of which stays zero and stands for all that were never written."""

    def __init__(self, file: WorkingFile, slots: int):
        self._file = file
        self.memory = private_memory(slots * BLOCK)  # in huge pages, for rows at random places
        """All slots, one after the other."""
        self._blocks = self.memory.reshape(slots, BLOCK)
        self._where = np.zeros(file.blocks, np.int32)
        """The slot of every block of the file, or :data:`_NOWHERE`."""
        self._block = np.full(slots, -1, np.int64)
        """The block in every slot, and what is to be known of it:"""
        self._pins = np.zeros(slots, np.int32)  # how many use it now, so that it stays
        self._pins[_UNWRITTEN] = 1
        self._used, self._loading, self._dirty, self._stored = (np.zeros(slots, bool) for _ in range(4))
        self._dirty_count = self._hand = 0
        self._most_dirty, self._least_dirty = slots // 4, slots // 8
        self._moved = threading.Condition()  # guards all of the above
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engram-block-writer")
        self._out = aligned(min(slots, _WRITTEN) * BLOCK)
        self._writing, self._urgent = False, 0
        self._failure: Exception | None = None

    def hold(self, blocks: Int64s, to_write: bool) -> Int64s:
        """The slots of distinct ascending ``blocks``, fewer than there are slots, which stay there until they are given
        to :meth:`release`; read from the file where they must be. Raises ``OSError`` naming the file."""
        while True:
            slots, taken = self._claim(blocks, to_write)
            self._load(slots, taken)
            with self._moved:
                while self._loading[slots].any():  # by another thread
                    self._moved.wait()
                if ((self._block[slots] == blocks) | (slots == _UNWRITTEN)).all():
                    return slots
            self.release(slots)  # that thread could not read: so this one finds out why

    def release(self, slots: Int64s, written: bool = False) -> None:
        """They are no longer used. ``written``: their blocks were changed."""
        with self._moved:
            if written:
                self._set_dirty(slots)
            self._pins[slots] -= 1
            if self._dirty_count > self._most_dirty:
                self._start_writing()
            self._moved.notify_all()

    def drain(self) -> None:
        """Return when every changed block is in the file. Raises as :meth:`require_sound` does."""
        with self._moved:
            while (self._dirty_count or self._writing) and self._failure is None:
                self._wait_for_writer()
        self.require_sound()

    def require_sound(self) -> None:
        """Raises what a write to the file raised: from then on changes stay in memory alone."""
        failure = self._failure
        if isinstance(failure, OSError):
            raise OSError(failure.errno, failure.strerror, failure.filename) from failure
        if failure is not None:
            raise RuntimeError(f"{self._file.path} could not be written ({failure}).") from failure

    # -- making room ----------------------------------------------------------------------------------------------

    def _claim(self, blocks: Int64s, to_write: bool) -> tuple[Int64s, Int64s]:
        """The slots of ``blocks``, pinned, and those of them that are to be loaded. Where there is no room, waits
        without holding any, so that others come to their end."""
        with self._moved:
            while True:
                slots = self._where[blocks].astype(np.int64)
                missing = slots == _NOWHERE
                if to_write:
                    missing |= slots == _UNWRITTEN
                found = slots[~missing]
                self._pins[found] += 1
                taken = self._evict(len(blocks) - len(found))
                if taken is not None:
                    break
                self._pins[found] -= 1
                self.require_sound()
                self._wait_for_writer()
            self._used[found] = True
            self._stored[taken] = slots[missing] == _NOWHERE
            self._block[taken] = blocks[missing]
            self._where[blocks[missing]] = taken
            self._loading[taken] = True
            slots[missing] = taken
            return slots, taken

    def _evict(self, count: int) -> Int64s | None:
        """So many slots for other blocks, pinned and empty; None, and nothing done, where too few can be had."""
        found, at, passed = [np.empty(0, np.int64)], self._hand, 0
        while count and passed < 2 * len(self._block):
            stop = min(at + max(4 * count, 1024), len(self._block))
            free = (self._pins[at:stop] == 0) & ~self._dirty[at:stop]
            slots = at + (free & ~self._used[at:stop]).nonzero()[0][:count]
            if len(slots) == count:
                stop = int(slots[-1]) + 1
            self._used[at:stop] = False
            self._pins[slots] = 1
            found.append(slots)
            count, passed, at = count - len(slots), passed + stop - at, stop % len(self._block)
        taken = np.concatenate(found)
        if count:
            self._pins[taken] = 0
            return None
        self._hand = at
        self._forget(taken)
        return taken

    def _forget(self, slots: Int64s) -> None:
        """Their blocks are in the file alone, or nowhere."""
        slots = slots[self._block[slots] >= 0]
        self._where[self._block[slots]] = np.where(self._stored[slots], _NOWHERE, _UNWRITTEN)
        self._block[slots] = -1

    def _load(self, slots: Int64s, taken: Int64s) -> None:
        """Fill the ``taken`` ones; gives up all of ``slots`` when that fails."""
        try:
            stored = self._stored[taken]
            self._blocks[taken[~stored]] = 0
            self._file.read(self._block[taken[stored]], self.memory, taken[stored] * BLOCK)
        except BaseException:
            with self._moved:
                self._forget(taken)
                self._loading[taken] = False
            self.release(slots)
            raise
        with self._moved:
            self._loading[taken] = False
            self._moved.notify_all()

    # -- writing --------------------------------------------------------------------------------------------------

    def _set_dirty(self, slots: Int64s) -> None:
        self._dirty_count += len(slots) - int(np.count_nonzero(self._dirty[slots]))
        self._dirty[slots] = True

    def _start_writing(self) -> None:
        if not self._writing and self._dirty_count and self._failure is None:
            self._writing = True
            self._writer.submit(self._write_back)

    def _wait_for_writer(self) -> None:
        """Wait until something moves, and let changed blocks be written even if they are few."""
        self._start_writing()
        self._urgent += 1
        try:
            self._moved.wait()
        finally:
            self._urgent -= 1

    def _write_back(self) -> None:
        """Write changed blocks until few are left, or none while somebody waits for it."""
        while True:
            with self._moved:
                enough = 0 if self._urgent else self._least_dirty
                if self._failure is not None or self._dirty_count <= enough:
                    self._writing = False
                    self._moved.notify_all()
                    return
                slots = self._next_dirty()
                self._dirty[slots] = False
                self._dirty_count -= len(slots)
                self._pins[slots] += 1
            failure = self._write(slots)
            with self._moved:
                self._failure = self._failure or failure
                if failure is None:
                    self._stored[slots] = True
                else:  # never to be replaced by what the file has
                    self._set_dirty(slots)
                self._pins[slots] -= 1
                self._moved.notify_all()

    def _next_dirty(self) -> Int64s:
        """The next ones that are to make room, in the order of the file."""
        dirty = self._dirty.nonzero()[0]
        slots = np.roll(dirty, -int(dirty.searchsorted(self._hand)))[:_WRITTEN]
        return slots[self._block[slots].argsort()]

    def _write(self, slots: Int64s) -> Exception | None:
        """Copied first: rows may be written into them meanwhile, which makes them dirty again."""
        try:
            out = self._out[: len(slots) * BLOCK]
            self._blocks.take(slots, 0, out.reshape(-1, BLOCK), mode="clip")
            self._file.write(self._block[slots], out, np.arange(len(slots)) * BLOCK)
        except Exception as error:  # whoever waits for room must hear of it, whatever it is
            return error
        return None
