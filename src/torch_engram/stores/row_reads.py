"""Many rows out of open files at once: what a reader is, and the one that works everywhere.

A reader is given rows by file and byte, neighbours after each other, and puts their bytes where they belong. All
components of the rows are asked for at once, so that a disk is waited for once. What takes long releases the GIL, and
what is held beside the rows stays within a budget. The quickest of the ways that
dev/experiments/disk_reads.py compares are :mod:`~torch_engram.stores.map_reads` through the page cache and
:mod:`~torch_engram.stores.block_reads` past it; threads that read run by run take their place where a system has
neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from torch_engram.stores.open_files import OpenFile

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]
_THREADS = 32


class Wanted(NamedTuple):
    """One component of rows: the i-th is read from byte ``starts[i]`` on of file ``number[i]`` to ``target[i]``."""

    number: Int64s
    """``[n]``, among the files of a read."""
    starts: Int64s
    """``[n]``."""
    target: Bytes
    """``[n, nbytes]``; the bytes of a row are contiguous, and others may lie between two rows."""


class RowReader(Protocol):
    """Reads components of rows out of open files."""

    def room(self, widths: Sequence[int]) -> int:
        """How many rows, with components of ``widths`` bytes, one :meth:`read` takes; 1 at least."""

    def read(self, files: Sequence[OpenFile], wanted: Sequence[Wanted]) -> None:
        """Read all that is wanted; returns when no read is under way any more.

        Raises ``OSError`` naming the file for a read error, or when it ends before; whether a file was changed
        otherwise is for the caller to find out afterwards.
        """


def flat(wanted: Sequence[Wanted]) -> tuple[Int64s, Int64s, Int64s]:
    """File, first byte and bytes of every row of one component after the other: int64 ``[N]`` each."""
    number = np.concatenate([each.number for each in wanted])
    starts = np.concatenate([each.starts for each in wanted])
    shapes = np.array([each.target.shape for each in wanted])
    return number, starts, shapes[:, 1].repeat(shapes[:, 0])


def bounds(apart: NDArray[np.bool_]) -> tuple[Int64s, Int64s]:
    """First and last of every run of ``n`` rows, where ``apart`` ``[n - 1]`` says which one does not go on with the
    next."""
    both = np.ones(len(apart) + 2, bool)
    both[1:-1] = apart
    return both[:-1].nonzero()[0], both[1:].nonzero()[0]


def unpack(packed: Bytes, wanted: Sequence[Wanted]) -> None:
    """Copy what was read side by side, one component after the other, where it belongs."""
    at = 0
    for _, _, target in wanted:
        target[:] = packed[at : at + target.size].reshape(target.shape)
        at += target.size


@dataclass(frozen=True)
class Runs:
    """Rows that follow each other without a gap, as one read each; all of them side by side."""

    number: Int64s
    starts: Int64s
    sizes: Int64s
    targets: Int64s
    """Each one's first byte in the target."""

    @classmethod
    def of(cls, wanted: Sequence[Wanted]) -> Runs:
        """Merged where a row begins where the one before it ends."""
        number, starts, nbytes = flat(wanted)
        ends = starts + nbytes
        first, last = bounds((starts[1:] != ends[:-1]) | (number[1:] != number[:-1]))
        begin = starts[first]
        sizes = ends[last] - begin
        return cls(number[first], begin, sizes, sizes.cumsum() - sizes)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, files: Sequence[OpenFile], target: Bytes, part: slice) -> None:
        """Read some of the runs, one after the other."""
        columns = (self.number[part], self.starts[part], self.sizes[part], self.targets[part])
        for number, start, size, at in zip(*(column.tolist() for column in columns), strict=True):
            files[number].read_into(start, target[at : at + size])


class ThreadReader:
    """Reads run by run from many threads. ``budget``: bytes of one read."""

    def __init__(self, budget: int):
        self._budget = budget
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="engram-disk")

    def room(self, widths: Sequence[int]) -> int:
        """See :class:`RowReader`."""
        return max(1, self._budget // sum(widths))

    def read(self, files: Sequence[OpenFile], wanted: Sequence[Wanted]) -> None:
        """See :class:`RowReader`."""
        runs, target = Runs.of(wanted), wanted[0].target
        straight = len(wanted) == 1 and target.flags.c_contiguous
        packed = target.reshape(-1) if straight else np.empty(sum(each.target.size for each in wanted), np.uint8)
        in_parts(self._pool, len(runs), -(-len(runs) // _THREADS), lambda part: runs.read(files, packed, part))
        if not straight:
            unpack(packed, wanted)


def in_parts(pool: ThreadPoolExecutor, count: int, size: int, work: Callable[[slice], None]) -> None:
    """Call ``work`` for 0 to ``count`` in slices of ``size``, on the pool's threads; returns when none is at work any
    more, and then raises what the first one raised. What is a single slice stays on this thread."""
    if 0 < count <= size:  # to wake another thread takes longer than a few rows
        work(slice(0, count))
        return
    done = [pool.submit(work, slice(start, min(start + size, count))) for start in range(0, count, size or 1)]
    errors = [error for future in done if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
