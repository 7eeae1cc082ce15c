"""The file that rows are in while they are trained on disk: this process's alone, made anew, gone at a clean end.

It is a sparse safetensors file of whole blocks of 4 KiB, read and written past the page cache where the file system
lets: rows are at random places of a file far larger than memory, so that pages kept of it would mostly be kept in vain.
"""

from __future__ import annotations

import fcntl
import gc
import os
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from torch_engram.durable import make_folder
from torch_engram.stores.aio import AioTransfer
from torch_engram.stores.block_reads import BLOCK, ThreadTransfer, Transfer, open_direct
from torch_engram.stores.open_files import unreadable
from torch_engram.stores.row_reads import Bytes, Int64s, bounds
from torch_engram.stores.tensor_files import Tensors, encode_header, file_size

_Piecewise = Callable[[int, list[memoryview], int], int]


class WorkingFile:
    """``path``, locked against other processes, with ``tensors`` of zeros; their bytes come to whole blocks.

    A file that a killed process left is replaced; this one is removed when nobody holds the object any more, and with
    it the folder if nothing else is in it. Any thread may read and write, none two at once to the same block.

    Raises ``ValueError`` when another process or bank has the file, ``OSError`` when it cannot be made. Where a system
    has no direct or no asynchronous I/O, other ways take its place with a warning.
    """

    def __init__(self, path: Path, tensors: Tensors):
        self.path, self.descriptor = path, _hold(path)
        weakref.finalize(self, _let_go, path, self.descriptor, os.getpid())
        header, size = encode_header(tensors), file_size(tensors)
        assert size % BLOCK == 0, f"{size} bytes are no whole blocks"
        self._start = len(header)
        self.blocks = (size - self._start) // BLOCK
        """Of data; they are numbered from 0."""
        try:
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, header, 0)
            os.ftruncate(self.descriptor, size)
        except OSError as error:
            raise _unwritable(path, 0, error.errno or 0) from error
        self._direct = self._open_direct()
        self._kind = _kind()
        self._idle: dict[bool, list[Transfer]] = {False: [], True: []}  # readers and writers that no thread uses

    def _open_direct(self) -> int:
        try:
            return open_direct(self, os.O_RDWR)
        except (OSError, AttributeError) as error:
            warnings.warn(f"{self.path} has no direct I/O ({error}): rows go through the page cache.", stacklevel=3)
            return self.descriptor

    def read(self, blocks: Int64s, buffer: Bytes, places: Int64s) -> None:
        """Fill ``buffer``, blocks that begin on a page, at ``places``, with ascending ``blocks``. Raises ``OSError``
        naming file and byte."""
        self._move(blocks, buffer, places, writes=False)

    def write(self, blocks: Int64s, buffer: Bytes, places: Int64s) -> None:
        """The other way. Raises ``OSError`` naming file and byte, as when the disk is full."""
        self._move(blocks, buffer, places, writes=True)

    def _move(self, blocks: Int64s, buffer: Bytes, places: Int64s, writes: bool) -> None:
        """Neighbours in the file that are neighbours in the buffer go as one."""
        if not len(blocks):
            return
        head, tail = bounds((blocks[1:] - blocks[:-1] != 1) | (places[1:] - places[:-1] != BLOCK))
        starts, sizes = self._start + blocks[head] * BLOCK, (tail - head + 1) * BLOCK
        try:
            transfer = self._idle[writes].pop()
        except IndexError:  # all of them are at work
            transfer = self._kind(writes)
        try:
            done = transfer(np.full(len(head), self._direct), starts, sizes, buffer, places[head])
        finally:
            self._idle[writes].append(transfer)
        for i in (done < sizes).nonzero()[0].tolist():
            start, at = int(starts[i]) + max(int(done[i]), 0), int(places[head[i]])
            if done[i] < 0:
                raise self._failed(writes, start, -int(done[i]))
            self._move_rest(start, buffer[at + int(done[i]) : at + int(sizes[i])].data, writes)

    def _move_rest(self, start: int, view: memoryview, writes: bool) -> None:
        """What the system did not move at once: it moves less, or says why not."""
        move: _Piecewise = os.pwritev if writes else os.preadv
        while view:
            try:
                done = move(self.descriptor, [view], start)
            except OSError as error:
                raise self._failed(writes, start, error.errno or 0) from error
            if not done:
                raise OSError(f"{self.path} ends at byte {start:,}: somebody truncated it; go on from a checkpoint.")
            view, start = view[done:], start + done

    def _failed(self, writes: bool, start: int, number: int) -> OSError:
        return _unwritable(self.path, start, number) if writes else unreadable(self.path, start, number)


def _hold(path: Path) -> int:
    """A descriptor of ``path``, made where it is not there, that holds the lock on it."""
    try:
        return _try_to_hold(path)
    except BlockingIOError:
        gc.collect()  # a bank of this process may have it that nobody uses any more
    try:
        return _try_to_hold(path)
    except BlockingIOError as error:
        raise ValueError(
            f"Another process or bank trains rows in {path.parent}: wait for its end, or give another folder."
        ) from error


def _try_to_hold(path: Path) -> int:
    while True:  # whoever has it may remove it, and the folder, at any time
        make_folder(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _let_go(path: Path, descriptor: int, process: int) -> None:
    if os.getpid() == process:  # a fork's copy of the object goes without the file
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):  # others are in it, or other files
            path.parent.rmdir()
    os.close(descriptor)


def _kind() -> Callable[[bool], Transfer]:
    """What moves blocks here."""
    try:
        AioTransfer()
    except OSError as error:
        warnings.warn(f"There is no asynchronous I/O here ({error}): threads take its place.", stacklevel=4)
        return ThreadTransfer
    return AioTransfer


def _unwritable(path: Path, at: int, errno: int) -> OSError:
    return OSError(
        errno, f"{os.strerror(errno)} at byte {at:,}: make room on its disk, and go on from a checkpoint", str(path)
    )
