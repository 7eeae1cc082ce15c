"""Rows through the page cache: copied by the kernel out of a read-only map, a thousand with one call. Linux only.

A load from the map of a file that was truncated ends the process. So nothing here looks into a map: ``pwritev`` takes
rows out of it into a memory file, and stops where a page cannot be read. What it stopped at is read the plain way,
which says what is wrong. Pages that are not in memory would be waited for one at a time; where the call before had to
wait for the disk, a call asks for all of its pages first.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from torch_engram.stores.open_files import OpenFile
from torch_engram.stores.row_reads import Bytes, Int64s, Runs, Wanted, in_parts

_RUNS_A_CALL = 1024  # what the kernel takes at once (IOV_MAX)
_PAGE = mmap.PAGESIZE
_SECTORS_A_PAGE = _PAGE // 512
_VECTOR = np.dtype([("base", np.uint64), ("size", np.uint64)])


class MapReader:
    """``budget``: bytes of the memory file. Raises ``OSError`` or ``AttributeError`` where a system cannot do this."""

    def __init__(self, budget: int):
        self._budget = budget
        self._memory = os.memfd_create("engram-rows")
        weakref.finalize(self, os.close, self._memory)
        os.posix_fallocate(self._memory, 0, budget)  # a lack of memory is told here, as an error
        self._staging = np.frombuffer(mmap.mmap(self._memory, budget), np.uint8)
        self._pwritev = ctypes.CDLL(None, use_errno=True).pwritev
        self._pwritev.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
        self._pwritev.restype = ctypes.c_ssize_t
        self._maps: dict[OpenFile, tuple[int, Bytes]] = {}
        self._pool = ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 1)), thread_name_prefix="engram-disk")
        self._waits = True
        """Whether the newest call had to wait for the disk."""

    def room(self, widths: Sequence[int]) -> int:
        """See :class:`~torch_engram.stores.row_reads.RowReader`."""
        return max(1, self._budget // sum(widths))

    def read(self, files: Sequence[OpenFile], wanted: Wanted) -> None:
        """See :class:`~torch_engram.stores.row_reads.RowReader`."""
        runs, packed, size = Runs.of(wanted), self._staging, wanted.size
        if size > self._budget:  # a single row that is larger than the memory file
            packed = np.empty(size, np.uint8)
            runs.read(files, packed, slice(None))
        else:
            bases = np.array([self._map(file) for file in files], np.int64)
            addresses = bases[runs.number] + runs.starts
            in_parts(self._pool, len(runs), _RUNS_A_CALL, lambda part: self._copy(files, runs, addresses, part))
        wanted.unpack(packed)

    def unmap(self) -> None:
        """Give all maps back, for the system does not drop pages that are mapped."""
        self._maps.clear()

    def _map(self, file: OpenFile) -> int:
        """The address of a file's first byte."""
        if file not in self._maps:
            file.require_unchanged()  # of one that was truncated there is no map
            mapped = mmap.mmap(file.descriptor, file.size, mmap.MAP_SHARED, mmap.PROT_READ)
            mapped.madvise(mmap.MADV_RANDOM)
            there = np.frombuffer(mapped, np.uint8)
            self._maps[file] = there.ctypes.data, there
        return self._maps[file][0]

    def _copy(self, files: Sequence[OpenFile], runs: Runs, addresses: Int64s, part: slice) -> None:
        """Bring some runs, at most as many as the kernel takes at once, into the memory file."""
        sectors = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
        if self._waits:
            _ask_for_pages(files, runs, part)
        vectors = np.empty(part.stop - part.start, _VECTOR)
        vectors["base"], vectors["size"] = addresses[part], runs.sizes[part]
        at, wanted = int(runs.targets[part.start]), int(runs.sizes[part].sum())
        done = self._pwritev(self._memory, vectors.ctypes.data, len(vectors), at)
        if done < wanted:
            stopped = int(np.searchsorted(runs.targets[part], at + max(done, 0), side="right")) - 1
            runs.read(files, self._staging, slice(part.start + stopped, part.stop))
        pages = (resource.getrusage(resource.RUSAGE_THREAD).ru_inblock - sectors) / _SECTORS_A_PAGE
        self._waits = pages > len(vectors) / 100


def _ask_for_pages(files: Sequence[OpenFile], runs: Runs, part: slice) -> None:
    first, last = runs.starts[part] // _PAGE, (runs.starts[part] + runs.sizes[part] - 1) // _PAGE
    for number, page, pages in zip(
        runs.number[part].tolist(), first.tolist(), (last - first + 1).tolist(), strict=True
    ):
        os.posix_fadvise(files[number].descriptor, page * _PAGE, pages * _PAGE, os.POSIX_FADV_WILLNEED)
