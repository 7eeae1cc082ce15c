"""Rows past the page cache: whole blocks of 4 KiB, read by the disk itself into a buffer, and rows picked out of it.

For tables that are far larger than memory, so that they leave its cache to others. Rows that share blocks, or lie in
neighbouring ones, are one read.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from torch_engram.stores.open_files import OpenFile, unreadable
from torch_engram.stores.row_reads import Bytes, Int64s, Wanted, bounds, in_parts

BLOCK = 4096
_THREADS = 64

Transfer = Callable[[Int64s, Int64s, Int64s, Bytes, Int64s], Int64s]
"""Moves ``sizes`` bytes from ``starts`` on of descriptors to places in a buffer, or the other way, all int64 ``[n]``;
returns how many bytes each one moved, or the negative error number. Returns when nothing is under way any more."""


class BlockReader:
    """``direct``: every file's descriptor from :func:`open_direct`. ``budget``: bytes of the buffer. ``transfer``: how
    blocks get there."""

    def __init__(self, direct: Mapping[OpenFile, int], budget: int, transfer: Transfer):
        self._direct, self._buffer, self._transfer = dict(direct), aligned(budget), transfer

    def room(self, widths: Sequence[int]) -> int:
        """See :class:`~torch_engram.stores.row_reads.RowReader`."""
        return max(1, len(self._buffer) // _most_bytes(widths))

    def read(self, files: Sequence[OpenFile], wanted: Wanted) -> None:
        """See :class:`~torch_engram.stores.row_reads.RowReader`."""
        most = _most_bytes(wanted.widths)
        if most > len(self._buffer):  # a single row that is larger than the buffer
            self._buffer = aligned(most)
        number, starts, nbytes = wanted.flat()
        begin = starts & -BLOCK
        end = (starts + (nbytes + BLOCK - 1)) & -BLOCK
        backwards = starts[1:] < starts[:-1]  # a tensor of later rows may lie before, and so may another component
        head, tail = bounds((number[1:] != number[:-1]) | (begin[1:] > end[:-1]) | backwards)
        first = begin[head]
        sizes = end[tail] - first
        places = sizes.cumsum() - sizes
        self._fill(files, number[head], first, sizes, places)
        _pick(self._buffer, (places - first).repeat(tail - head + 1) + starts, wanted)

    def _fill(self, files: Sequence[OpenFile], number: Int64s, starts: Int64s, sizes: Int64s, places: Int64s) -> None:
        """Read blocks to their places in the buffer; the last block of a file may be short."""
        descriptors = np.array([self._direct[file] for file in files], np.int64)[number]
        done = self._transfer(descriptors, starts, sizes, self._buffer, places)
        for i in (done < sizes).nonzero()[0].tolist():
            file, start, read, at = files[number[i]], int(starts[i]), int(done[i]), int(places[i])
            if read < 0:
                file.require_unchanged()
                raise unreadable(file.path, start, -read)
            wanted = min(int(sizes[i]), file.size - start)
            if read < wanted:
                file.read_into(start + read, self._buffer[at + read : at + wanted])


class Opened(Protocol):
    """What holds a file open."""

    @property
    def descriptor(self) -> int:
        """Of the file."""


def open_direct(file: Opened, access: int = os.O_RDONLY) -> int:
    """Another descriptor, for direct reads, of the very file that is open, whatever its name is by now; closed with it.
    ``access``: ``os.O_RDWR`` for direct writes, too.

    Raises ``OSError`` or ``AttributeError`` where a file system or a system has none.
    """
    descriptor = os.open(f"/proc/self/fd/{file.descriptor}", access | os.O_DIRECT)
    weakref.finalize(file, os.close, descriptor)
    os.preadv(descriptor, [mmap.mmap(-1, BLOCK)], 0)  # some file systems open it, and read nothing
    return descriptor


class ThreadTransfer:
    """From many threads: a :data:`Transfer` from files, or with ``writes`` to them, wherever direct reads are."""

    def __init__(self, writes: bool = False) -> None:
        self._move = os.pwritev if writes else os.preadv
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="engram-disk")

    def __call__(self, descriptors: Int64s, starts: Int64s, sizes: Int64s, buffer: Bytes, places: Int64s) -> Int64s:
        """See :data:`Transfer`."""
        done = np.zeros(len(starts), np.int64)

        def some(part: slice) -> None:
            for i in range(part.start, part.stop):
                try:
                    view = buffer[places[i] : places[i] + sizes[i]].data
                    done[i] = self._move(int(descriptors[i]), [view], int(starts[i]))
                except OSError as error:
                    done[i] = -(error.errno or 5)

        in_parts(self._pool, len(starts), -(-len(starts) // _THREADS), some)
        return done


def _most_bytes(widths: Sequence[int]) -> int:
    """Of the blocks that a row with components of ``widths`` bytes may lie in."""
    return sum((-(-(nbytes - 1) // BLOCK) + 1) * BLOCK for nbytes in widths)


def aligned(nbytes: int) -> Bytes:
    """Zeroed bytes that begin on a page, and have none of their own before they are used."""
    return np.frombuffer(mmap.mmap(-1, -(-nbytes // BLOCK) * BLOCK), np.uint8)


def _pick(buffer: Bytes, at: Int64s, wanted: Wanted) -> None:
    """Copy components of rows, which begin at any byte ``at`` ``[C * n]`` of a buffer, to where they go."""
    for column, own in zip(wanted.columns(), at.reshape(wanted.starts.shape), strict=True):
        anywhere = np.ndarray((len(buffer) - column.itemsize + 1,), column.dtype, buffer, strides=(1,))
        column[wanted.to] = anywhere[own]
