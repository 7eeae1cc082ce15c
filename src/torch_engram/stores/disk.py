"""Tables on disk, read in place: rows come out of their files when they are asked for, and nothing is loaded.

Requests are deduplicated, sorted by place, merged where rows are neighbours, and read many at a time. Through the page
cache a row that was read lately comes from memory, for as long as the system has room; direct reads leave the memory to
others.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from torch_engram.forks import OneProcess
from torch_engram.stores.aio import AioTransfer
from torch_engram.stores.block_reads import BlockReader, ThreadTransfer, open_direct
from torch_engram.stores.file_rows import FileRows
from torch_engram.stores.map_reads import MapReader
from torch_engram.stores.open_files import OpenFile
from torch_engram.stores.records import ROW_MASK, SPACE_SHIFT
from torch_engram.stores.row_reads import Int64s, RowReader, ThreadReader

STAGING = 32 << 20
"""Bytes of each buffer that a fetch holds beside what it returns."""


class DiskStore:
    """A read-only store of tables in files, by space; their records must be alike.

    ``direct``: past the page cache (O_DIRECT); where a file system has none, through it, with a warning. ``staging``:
    bytes of each buffer that a fetch holds beside its result; a larger one goes in pieces. Any thread may fetch, one
    after the other.
    Raises ``ValueError`` when there is no table, or two have other records.
    """

    grouped = False

    def __init__(self, tables: Mapping[int, FileRows], direct: bool = False, staging: int = STAGING):
        layouts = {table.layout for table in tables.values()}
        if len(layouts) != 1:
            raise ValueError(f"{len(layouts)} kinds of records in one store: give tables of one width and codec.")
        (self.layout,) = layouts
        self.tables, self._staging = dict(tables), staging
        self.spaces = {space: table.rows for space, table in tables.items()}
        files = [file for table in tables.values() for file in table.files]
        self._reader = direct_reader(files, staging) if direct else cached_reader(staging)
        self._lock, self._process = threading.Lock(), OneProcess("A store of tables on disk")

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.Store`. Raises ``ValueError`` naming a row or a space that is not
        there, and ``OSError`` naming the file that cannot be read, or was changed since it was opened."""
        self._process.require()
        asked = keys.cpu().numpy()
        distinct, back = asked, None
        if (asked[1:] <= asked[:-1]).any():
            distinct, back = np.unique(asked, return_inverse=True)
        with self._lock:
            records = self._fetch_distinct(distinct, keys.device)
        return records if back is None else records[torch.from_numpy(back).to(keys.device)]

    def drop_pages(self) -> None:
        """Let the system forget what it keeps of the files in its page cache, as measurements of cold reads want. Linux
        only; pages that another process has mapped stay."""
        with self._lock:
            if isinstance(self._reader, MapReader):
                self._reader.unmap()
            for table in self.tables.values():
                for file in table.files:
                    os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _fetch_distinct(self, keys: Int64s, device: torch.device) -> Tensor:
        """Records of ascending keys."""
        records = torch.empty((len(keys), self.layout.nbytes), dtype=torch.uint8, device=device)
        for space, part in _by_space(keys):
            if space not in self.tables:
                raise ValueError(
                    f"There is no table with number {space} here: ask for {', '.join(map(str, self.tables))}."
                )
            self.tables[space].require_rows(keys[part] & ROW_MASK)
        for space, part in _by_space(keys):
            self._fetch_rows(self.tables[space], keys[part] & ROW_MASK, records[part])
        return records

    def _fetch_rows(self, table: FileRows, rows: Int64s, out: Tensor) -> None:
        """Fill ``out`` ``[n, nbytes]``, on any device, with the records of ascending rows."""
        places = table.current(rows)
        order = np.argsort(places, kind="stable") if places is not rows else None
        room = min(self._reader.room(column.nbytes) for column in table.columns)
        room = max(1, min(room, self._staging // self.layout.nbytes))
        for start in range(0, len(rows), room):
            part = slice(start, start + room)
            if order is None and out.device.type == "cpu":
                self._read(table, places[part], out[part])
                continue
            chosen = places[part] if order is None else places[order[part]]
            staged = torch.empty((len(chosen), self.layout.nbytes), dtype=torch.uint8, pin_memory=out.is_cuda)
            self._read(table, chosen, staged)
            if order is None:
                out[part].copy_(staged, non_blocking=True)
            else:
                to = torch.from_numpy(order[part]).to(out.device)
                out.index_copy_(0, to, staged.to(out.device, non_blocking=True))

    def _read(self, table: FileRows, places: Int64s, records: Tensor) -> None:
        """Fill ``records`` ``[n, nbytes]`` in host memory with ascending rows, as the table's columns number them."""
        if not self.layout.gapless:
            records.zero_()
        used: set[int] = set()
        for column in table.columns:
            number, starts = column.locate(places)
            used.update(np.unique(number).tolist())
            whole = column.nbytes == self.layout.nbytes  # a record is this component, so that it is read where it goes
            target = records if whole else torch.empty((len(places), column.nbytes), dtype=torch.uint8)
            self._reader.read(table.files, number, starts, column.nbytes, target.numpy().reshape(-1))
            if not whole:
                records[:, column.field.start : column.field.stop] = target
        for index in used:
            table.files[index].require_unchanged()


def cached_reader(staging: int) -> RowReader:
    """The quickest way through the page cache that this system has."""
    try:
        return MapReader(staging)
    except (OSError, AttributeError) as error:
        if sys.platform == "linux":
            warnings.warn(f"There are no memory files here ({error}): threads read row by row.", stacklevel=3)
        return ThreadReader(staging)


def direct_reader(files: Sequence[OpenFile], staging: int) -> RowReader:
    """The quickest way past the page cache that these files have, and otherwise one through it."""
    direct: dict[OpenFile, int] = {}
    for file in files:
        try:
            direct[file] = open_direct(file)
        except (OSError, AttributeError) as error:
            warnings.warn(f"{file.path} has no direct reads ({error}): rows come through the page cache.", stacklevel=3)
            return cached_reader(staging)
    try:
        return BlockReader(direct, staging, AioTransfer())
    except OSError as error:
        warnings.warn(f"There are no asynchronous reads here ({error}): threads take their place.", stacklevel=3)
        return BlockReader(direct, staging, ThreadTransfer())


def _by_space(keys: Int64s) -> Iterator[tuple[int, slice]]:
    """Where the keys of every space are among ascending ones."""
    spaces = keys >> SPACE_SHIFT
    starts = np.flatnonzero(np.diff(spaces, prepend=spaces[:1] - 1)).tolist()
    for start, stop in pairwise([*starts, len(keys)]):
        yield int(spaces[start]), slice(start, stop)
