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
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from torch_engram.forks import OneProcess
from torch_engram.stores.aio import AioTransfer
from torch_engram.stores.asks import Ask, PlainAsk
from torch_engram.stores.block_reads import BlockReader, ThreadTransfer, open_direct
from torch_engram.stores.file_rows import FileRows
from torch_engram.stores.map_reads import MapReader
from torch_engram.stores.open_files import OpenFile
from torch_engram.stores.records import ROW_MASK, SPACE_SHIFT
from torch_engram.stores.row_reads import Bytes, Int64s, RowReader, ThreadReader, Wanted
from torch_engram.stores.staged_asks import StagedAsk

STAGING = 32 << 20
"""Bytes of each buffer that a fetch holds beside what it returns."""
STAGED = 4096
"""Rows that a GPU asks for by way of a buffer that is kept, at most."""


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
        assert all(table.whole for table in tables.values()), "rows that are in no file cannot be read in place"
        (self.layout,) = layouts
        self.tables, self._staging = dict(tables), staging
        self.spaces = {space: table.rows for space, table in tables.items()}
        files = [file for table in tables.values() for file in table.files]
        self._reader = direct_reader(files, staging) if direct else cached_reader(staging)
        self._fields = [slice(field.start, field.stop) for field in self.layout.fields]
        room = self._reader.room([field.component.nbytes for field in self.layout.fields])
        self._room = max(1, min(room, staging // self.layout.nbytes))
        """Rows of a piece."""
        self._lock, self._process = threading.Lock(), OneProcess("A store of tables on disk")

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.Store`. Raises ``ValueError`` naming a row or a space that is not
        there, and ``OSError`` naming the file that cannot be read, or was changed since it was opened."""
        asked = keys.cpu().numpy()
        if keys.device.type == "cpu":
            records = torch.empty((len(asked), self.layout.nbytes), dtype=torch.uint8)
            self.fetch_into(asked, records)
            return records
        distinct, back = asked, None
        if (asked[1:] <= asked[:-1]).any():
            distinct, back = np.unique(asked, return_inverse=True)
        self._there(distinct)  # all of them, before the first is read
        records = torch.empty((len(distinct), self.layout.nbytes), dtype=torch.uint8, device=keys.device)
        most = max(1, self._staging // self.layout.nbytes)
        for start in range(0, len(distinct), most):
            part = slice(start, start + most)
            staged = torch.empty(records[part].shape, dtype=torch.uint8, pin_memory=True)
            self.fetch_into(distinct[part], staged)
            records[part].copy_(staged, non_blocking=True)
        return records if back is None else records[torch.from_numpy(back).to(keys.device)]

    def fetch_into(self, keys: Int64s, out: Tensor) -> None:
        """Fill ``out`` uint8 ``[len(keys), nbytes]`` in host memory. Raises as :meth:`fetch` does."""
        self._process.require()
        order = None if (keys[1:] >= keys[:-1]).all() else keys.argsort()
        ascending = keys if order is None else keys[order]
        is_new = ascending[1:] != ascending[:-1]
        if is_new.all():
            self._read_all(ascending, order, out.numpy())
            return
        chosen, back = np.append(True, is_new), np.empty(len(keys), np.int64)
        back[slice(None) if order is None else order] = chosen.cumsum() - 1
        distinct = ascending[chosen]
        records = torch.empty((len(distinct), self.layout.nbytes), dtype=torch.uint8)
        self._read_all(distinct, None, records.numpy())
        torch.index_select(records, 0, torch.from_numpy(back), out=out)

    def new_ask(self, capacity: int, device: torch.device) -> Ask:
        """See :class:`~torch_engram.stores.asks.AskedStore`."""
        return StagedAsk(self, capacity, device) if capacity <= STAGED else PlainAsk(self, capacity, device)

    def drop_pages(self) -> None:
        """Let the system forget what it keeps of the files in its page cache, as measurements of cold reads want. Linux
        only; pages that another process has mapped stay."""
        with self._lock:
            if isinstance(self._reader, MapReader):
                self._reader.unmap()
            for table in self.tables.values():
                for file in table.files:
                    os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _there(self, keys: Int64s) -> list[tuple[FileRows, Int64s, slice]]:
        """Every table that ascending keys are of, its rows, and where they are among the keys. Raises ``ValueError``
        naming a row or a space that is not there."""
        found, start = [], 0
        while start < len(keys):
            space = int(keys[start]) >> SPACE_SHIFT
            if space not in self.tables:
                raise ValueError(
                    f"There is no table with number {space} here: ask for {', '.join(map(str, self.tables))}."
                )
            stop = int(keys.searchsorted(space << SPACE_SHIFT | ROW_MASK, side="right"))
            rows = keys[start:stop] & ROW_MASK
            self.tables[space].require_rows(rows)
            found.append((self.tables[space], rows, slice(start, stop)))
            start = stop
        return found

    def _read_all(self, keys: Int64s, to: Int64s | None, records: Bytes) -> None:
        """Read the records of ascending keys to places ``to`` of ``records``, or in their order."""
        there = self._there(keys)
        for gap in self.layout.gaps:
            records[:, gap] = 0
        with self._lock:
            for table, rows, part in there:
                if to is None:
                    self._read(table, rows, None, records[part])
                else:
                    self._read(table, rows, to[part], records)

    def _read(self, table: FileRows, rows: Int64s, to: Int64s | None, records: Bytes) -> None:
        """As :meth:`_read_all`, ascending rows of one table."""
        places = table.current(rows)
        if places is not rows:
            order = places.argsort(kind="stable")
            places, to = places[order], order if to is None else to[order]
        used = np.zeros(len(table.files), bool)
        for start in range(0, len(rows), self._room):
            part = slice(start, start + self._room)
            number, starts = table.locate(places[part])
            used[number] = True
            target = (records[part], slice(None)) if to is None else (records, to[part])
            self._reader.read(table.files, Wanted(number, starts, self._fields, *target))
        for index in used.nonzero()[0].tolist():
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
