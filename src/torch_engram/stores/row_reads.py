"""Many rows out of open files at once: what a reader is, and the one that works everywhere.

A reader is given rows by file and byte, neighbours after each other, and puts their bytes where they belong. All
components of the rows are asked for at once, so that a disk is waited for once. What takes long releases the GIL, and
what is held beside the rows stays within a budget. The quickest of the ways that
dev/experiments/disk_reads.py compares are :mod:`~torch_engram.stores.map_reads` through the page cache and
:mod:`~torch_engram.stores.block_reads` past it; threads that read run by run take their place where a system has
neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """``n`` rows to be read, in ``C`` components each, and where they go to."""

    number: Int64s
    """``[C, n]``: in which file of a read each one lies."""
    starts: Int64s
    """``[C, n]``: its first byte there."""
    fields: Sequence[slice]
    """``C`` parts of a record."""
    records: Bytes
    """``[R, nbytes]``, contiguous rows."""
    to: Int64s | slice
    """Which of the records the rows are."""

    @property
    def widths(self) -> list[int]:
        """``C`` numbers of bytes."""
        return [field.stop - field.start for field in self.fields]

    @property
    def size(self) -> int:
        """Bytes of all components."""
        return int(self.starts.shape[1]) * sum(self.widths)

    def flat(self) -> tuple[Int64s, Int64s, Int64s]:
        """File, first byte and bytes of one component of every row after the other: int64 ``[C * n]`` each."""
        nbytes = np.array(self.widths).repeat(self.starts.shape[1])
        return self.number.reshape(-1), self.starts.reshape(-1), nbytes

    def columns(self) -> Iterator[NDArray[np.void]]:
        """Each component of the records, ``[R]``, one element a row."""
        for field, width in zip(self.fields, self.widths, strict=True):
            yield self.records[:, field].view(np.dtype((np.void, width)))[:, 0]

    def unpack(self, packed: Bytes) -> None:
        """Copy what was read side by side, one component of every row after the other, to where it goes."""
        at = 0
        for column in self.columns():
            size = self.starts.shape[1] * column.itemsize
            column[self.to] = packed[at : at + size].view(column.dtype)
            at += size


class RowReader(Protocol):
    """Reads components of rows out of open files."""

    def room(self, widths: Sequence[int]) -> int:
        """How many rows, with components of ``widths`` bytes, one :meth:`read` takes; 1 at least."""

    def read(self, files: Sequence[OpenFile], wanted: Wanted) -> None:
        """Read all that is wanted; returns when no read is under way any more.

        Raises ``OSError`` naming the file for a read error, or when it ends before; whether a file was changed
        otherwise is for the caller to find out afterwards.
        """


def bounds(apart: NDArray[np.bool_]) -> tuple[Int64s, Int64s]:
    """First and last of every run of ``n`` rows, where ``apart`` ``[n - 1]`` says which one does not go on with the
    next."""
    both = np.ones(len(apart) + 2, bool)
    both[1:-1] = apart
    return both[:-1].nonzero()[0], both[1:].nonzero()[0]


@dataclass(frozen=True)
class Runs:
    """Rows that follow each other without a gap, as one read each; all of them side by side."""

    number: Int64s
    starts: Int64s
    sizes: Int64s
    targets: Int64s
    """Each one's first byte in the target."""

    @classmethod
    def of(cls, wanted: Wanted) -> Runs:
        """Merged where a row begins where the one before it ends."""
        number, starts, nbytes = wanted.flat()
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

    def read(self, files: Sequence[OpenFile], wanted: Wanted) -> None:
        """See :class:`RowReader`."""
        runs, packed = Runs.of(wanted), np.empty(wanted.size, np.uint8)
        in_parts(self._pool, len(runs), -(-len(runs) // _THREADS), lambda part: runs.read(files, packed, part))
        wanted.unpack(packed)


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
