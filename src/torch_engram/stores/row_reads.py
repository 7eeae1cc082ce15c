"""Many rows out of open files at once: what a reader is, and the one that works everywhere.

A reader is given rows by file and byte, neighbours after each other, and puts their bytes side by side. What takes long
releases the GIL, and what is held beside the rows stays within a budget. The quickest of the ways that
dev/experiments/disk_reads.py compares are :mod:`~torch_engram.stores.map_reads` through the page cache and
:mod:`~torch_engram.stores.block_reads` past it; threads that read run by run take their place where a system has
neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from torch_engram.stores.open_files import OpenFile

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]
_THREADS = 32


class RowReader(Protocol):
    """Reads rows of equal size out of open files."""

    def room(self, nbytes: int) -> int:
        """How many rows of ``nbytes`` bytes one :meth:`read` takes; 1 at least."""

    def read(self, files: Sequence[OpenFile], number: Int64s, starts: Int64s, nbytes: int, target: Bytes) -> None:
        """Read row i, ``nbytes`` bytes from ``starts[i]`` on in ``files[number[i]]``, to ``target[i * nbytes:]``.

        ``target``: contiguous, ``[n * nbytes]``. Raises ``OSError`` naming the file for a read error, or when it ends
        before; whether a file was changed otherwise is for the caller to find out afterwards.
        """


@dataclass(frozen=True)
class Runs:
    """Rows that follow each other without a gap, as one read each."""

    number: Int64s
    starts: Int64s
    sizes: Int64s
    targets: Int64s
    """Each one's first byte in the target."""

    @classmethod
    def of(cls, number: Int64s, starts: Int64s, nbytes: int) -> Runs:
        """Merged where a row begins where the one before it ends."""
        is_first = np.ones(len(starts), bool)
        is_first[1:] = (starts[1:] != starts[:-1] + nbytes) | (number[1:] != number[:-1])
        first = np.flatnonzero(is_first)
        return cls(number[first], starts[first], np.diff(first, append=len(starts)) * nbytes, first * nbytes)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, files: Sequence[OpenFile], target: Bytes, part: slice) -> None:
        """Read some of the runs, one after the other."""
        columns = (self.number[part], self.starts[part], self.sizes[part], self.targets[part])
        for number, start, size, at in zip(*(column.tolist() for column in columns), strict=True):
            files[number].read_into(start, target[at : at + size])


class ThreadReader:
    """Reads run by run from many threads, straight to the target. ``budget``: bytes of one read."""

    def __init__(self, budget: int):
        self._budget = budget
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="engram-disk")

    def room(self, nbytes: int) -> int:
        """See :class:`RowReader`."""
        return max(1, self._budget // nbytes)

    def read(self, files: Sequence[OpenFile], number: Int64s, starts: Int64s, nbytes: int, target: Bytes) -> None:
        """See :class:`RowReader`."""
        runs = Runs.of(number, starts, nbytes)
        in_parts(self._pool, len(runs), -(-len(runs) // _THREADS), lambda part: runs.read(files, target, part))


def in_parts(pool: ThreadPoolExecutor, count: int, size: int, work: Callable[[slice], None]) -> None:
    """Call ``work`` for 0 to ``count`` in slices of ``size``, on the pool's threads; returns when none is at work any
    more, and then raises what the first one raised."""
    done = [pool.submit(work, slice(start, min(start + size, count))) for start in range(0, count, size or 1)]
    errors = [error for future in done if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
