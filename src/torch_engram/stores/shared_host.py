"""Tables that are only read, in host memory: one copy for all processes of a machine, or a copy of this process's own
that a GPU reads faster; and rows of it to any device."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from torch_engram.stores.file_rows import FileRows
from torch_engram.stores.host_asks import HostAsk
from torch_engram.stores.host_memory import own_memory
from torch_engram.stores.host_reads import HostReads
from torch_engram.stores.loaded import load_rows
from torch_engram.stores.pages import Bytes
from torch_engram.stores.records import RecordLayout
from torch_engram.stores.shared_memory import node_memory
from torch_engram.stores.table import RecordTable

_PIECE, _READERS = 16 << 20, 4
"""Bytes of a table that are read at once, and how many such pieces."""


class SharedHostStore:
    """A read-only store of tables in files, by space, that the first process to open them loads for all of one user.

    ``layout``: of the records; rows in another codec are encoded again, rounded to nearest. ``shared``: whether there
    is one copy for all; without it this process has its own, which GPUs read several times faster
    (:mod:`~torch_engram.stores.host_memory`). A shared table is the same one for another process when its files are (by
    device, inode, size and time of change) and its layout; what replaces a file is loaded anew. Where the system has
    nothing to share, or not enough, every process has a copy of its own, with a warning. Any thread may fetch. Raises
    ``OSError`` naming the file that cannot be read, ``MemoryError`` when there is no room.
    """

    grouped = False

    def __init__(self, tables: Mapping[int, FileRows], layout: RecordLayout, shared: bool = True):
        self.layout, self.spaces = layout, {space: table.rows for space, table in tables.items()}
        size = sum(self.spaces.values()) * layout.nbytes
        fill = partial(_fill, tables=tables, layout=layout)
        if shared:
            memory = node_memory(digest_of(tables, layout), size, fill)
        else:
            memory = own_memory(size)
            fill(memory.bytes)
        self.table = RecordTable(layout, self.spaces, torch.device("cpu"), memory)
        self._reads: dict[torch.device, HostReads] = {}
        self._lock = threading.Lock()

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.Store`. Raises ``ValueError`` naming a row or a space that is not
        there. The first fetch for a GPU pins the table and measures the ways there."""
        if keys.device.type == "cpu":
            return self.table.gather(keys)
        return self._reads_of(keys.device).fetch(keys)

    def new_ask(self, capacity: int, device: torch.device) -> HostAsk:
        """See :class:`~torch_engram.stores.asks.AskedStore`."""
        return self._reads_of(device).new_ask(capacity)

    def _reads_of(self, device: torch.device) -> HostReads:
        with self._lock:
            if device not in self._reads:
                self._reads[device] = HostReads(self.table, device)
            return self._reads[device]


def digest_of(tables: Mapping[int, FileRows], layout: RecordLayout) -> str:
    """What distinguishes the records of some tables from those of others, 32 hexadecimal digits."""
    facts: list[object] = [1, layout]
    for space, table in tables.items():
        places = [(c.field, c.firsts.tolist(), c.files.tolist(), c.starts.tolist()) for c in table.columns]
        facts += [space, table.rows, table.layout, places]
        for file in table.files:  # the time of change may have been set to another's, this one cannot
            facts += [file.identity, os.fstat(file.descriptor).st_ctime_ns]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _fill(memory: Bytes, tables: Mapping[int, FileRows], layout: RecordLayout) -> None:
    """Put the records of all tables side by side into zeroed memory, a few bounded pieces at a time."""
    records = torch.from_numpy(memory).view(-1, layout.nbytes)
    rows = max(1, _PIECE // layout.nbytes)
    pieces: list[Callable[[], None]] = []
    base = 0
    for table in tables.values():
        part = records[base : base + table.rows]
        pieces += [
            partial(load_rows, table, first, part[first : first + rows], layout) for first in range(0, table.rows, rows)
        ]
        base += table.rows
    with ThreadPoolExecutor(_READERS, thread_name_prefix="engram-load") as readers:
        loading = [readers.submit(piece) for piece in pieces]
        try:
            for done in loading:
                done.result()
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise
