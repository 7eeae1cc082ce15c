"""What this machine could do at best with rows of a table: copies and gathers in memory, the bus, reads of the disk.

Each is a plain benchmark of one thing, in the same run as what is held against it: no addressing, nothing sorted or
picked out, no row twice. Rates are in GB/s (1e9 bytes), and count what was asked for: of the blocks that a row lies in,
the row.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from torch_engram.bench.results import Measurement
from torch_engram.bench.timing import copy_rate, milliseconds, wall_milliseconds
from torch_engram.stores import FileRows, HostStore
from torch_engram.stores.aio import AioTransfer
from torch_engram.stores.block_reads import BLOCK, ThreadTransfer, Transfer, open_direct
from torch_engram.stores.records import RecordLayout
from torch_engram.stores.row_reads import Int64s
from torch_engram.stores.table import RecordTable

_REPEATS = 7
_READS = 16_384
"""Blocks, or rows, that a sample of the disk reads."""
_GATHERED = 1 << 18
"""Rows that a sample of a gather reads."""
_TABLE_BYTES = 1 << 30
_COPIED = 1 << 28


def limits(tables: Sequence[FileRows], device: torch.device) -> Iterator[Measurement]:
    """All limits that apply here, one after the other; ``tables``: whose files and rows are read."""
    yield Measurement("memory-copy", [copy_rate("cpu") / 1e6], "GB/s")
    yield gather(tables[0].layout, torch.device("cpu"))
    if device.type == "cuda":
        yield bus_copy(device)
        yield Measurement("gpu-copy", [copy_rate(device) / 1e6], "GB/s")
        yield gather(tables[0].layout, device)
    try:
        disk = RandomReads(tables)
    except (OSError, AttributeError):  # a file system, or a system, without direct reads
        return
    blocks, rows = [disk.blocks(_READS) for _ in range(_REPEATS)], [disk.rows(_READS) for _ in range(_REPEATS)]
    yield Measurement("disk-4k", [BLOCK * _READS / ms / 1e6 for ms in blocks], "GB/s")
    yield Measurement("disk-4k-reads", [_READS / ms for ms in blocks], "k reads/s")
    yield Measurement("disk-rows", [disk.row_bytes * _READS / ms / 1e6 for ms in rows], "GB/s")


def gather(layout: RecordLayout, device: torch.device) -> Measurement:
    """Random distinct records out of a table of 1 GiB (a sixteenth of it without a GPU) in this device's memory, by
    what stores gather with."""
    size = _TABLE_BYTES if device.type == "cuda" else _TABLE_BYTES // 16
    rows = size // layout.nbytes
    table = RecordTable(layout, {0: rows}, device)
    table.records.fill_(1)  # a CPU maps pages at first touch
    count = min(_GATHERED, rows // 2)
    keys = [torch.randperm(rows)[:count].to(device) for _ in range(_REPEATS + 2)]
    taken = iter(keys)
    times = milliseconds(lambda: table.gather(next(taken)), _REPEATS, 2, device)
    rates = [count * layout.nbytes / ms / 1e6 for ms in times]
    return Measurement(f"{'gpu' if device.type == 'cuda' else 'memory'}-gather", rates, "GB/s")


def host_gather(layout: RecordLayout, device: torch.device) -> Measurement:
    """Random distinct records out of a table of 1 GiB in host memory to a GPU, by what stores fetch with."""
    store = HostStore(layout, {0: _TABLE_BYTES // layout.nbytes}, for_gpu=True)
    count = min(_GATHERED, store.spaces[0] // 2)
    keys = [torch.randperm(store.spaces[0])[:count].to(device) for _ in range(_REPEATS + 2)]
    times = [wall_milliseconds(partial(store.fetch, wanted), 1, device) for wanted in keys][2:]
    return Measurement("host-gather", [count * layout.nbytes / ms / 1e6 for ms in times], "GB/s")


def bus_copy(device: torch.device) -> Measurement:
    """Pinned memory to the GPU."""
    source = torch.ones(_COPIED, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    times = milliseconds(lambda: target.copy_(source, non_blocking=True), _REPEATS, 2, device)
    return Measurement("bus-copy", [_COPIED / ms / 1e6 for ms in times], "GB/s")


class RandomReads:
    """Reads past the page cache at random places of tables' files, as many under way as the disk takes.

    Raises ``OSError`` or ``AttributeError`` where a file system or a system has no direct reads.
    """

    def __init__(self, tables: Sequence[FileRows], seed: int = 0):
        self._tables, self._random = list(tables), np.random.default_rng(seed)
        self._files = list(dict.fromkeys(file for table in tables for file in table.files))
        self._descriptors = np.array([open_direct(file) for file in self._files], np.int64)
        self._number = {file: number for number, file in enumerate(self._files)}
        self._blocks = np.array([-(-file.size // BLOCK) for file in self._files], np.int64)
        self._transfer = _transfer()
        self._buffer = np.frombuffer(mmap.mmap(-1, 1 << 26), np.uint8)  # begins on a page
        self.row_bytes = sum(column.nbytes for column in self._tables[0].columns)
        """Of all components of a row."""

    def blocks(self, count: int) -> float:
        """Milliseconds that so many blocks of 4 KiB take, all distinct where the files have as many."""
        ends = np.cumsum(self._blocks)
        total = int(ends[-1])
        at = self._random.choice(total, count, replace=count > total // 2)
        file = np.searchsorted(ends, at, side="right")
        starts = (at - (ends - self._blocks)[file]) * BLOCK
        return self._timed(file, starts, np.full(count, BLOCK))

    def rows(self, count: int) -> float:
        """Milliseconds that so many random rows take: a read a component, of the blocks that it lies in."""
        table = self._tables[0]
        rows = self._random.integers(0, table.rows, count)
        own = np.array([self._number[file] for file in table.files], np.int64)
        files, firsts, sizes = [], [], []
        for column, number, starts in zip(table.columns, *table.locate(rows), strict=True):
            first = starts // BLOCK * BLOCK
            files.append(own[number])
            firsts.append(first)
            sizes.append(-(-(starts + column.nbytes) // BLOCK) * BLOCK - first)
        return self._timed(np.concatenate(files), np.concatenate(firsts), np.concatenate(sizes))

    def _timed(self, files: Int64s, starts: Int64s, sizes: Int64s) -> float:
        places = (np.cumsum(sizes) - sizes) % (len(self._buffer) - int(sizes.max()) + 1) // BLOCK * BLOCK
        descriptors = self._descriptors[files]

        def read() -> None:
            done = self._transfer(descriptors, starts, sizes, self._buffer, places)
            assert (done > 0).all(), "a random read failed"

        return wall_milliseconds(read, 1, "cpu")


def _transfer() -> Transfer:
    try:
        return AioTransfer()
    except OSError:
        return ThreadTransfer()


def limit_of(placement: str, device: torch.device, cold: bool) -> str:
    """Which limit a placement's lookups are held against: the disk's where rows must come from it."""
    on_gpu = device.type == "cuda"
    if placement == "disk-direct" or (placement == "disk" and cold):
        return "disk-rows"
    if placement == "device":
        return "gpu-gather" if on_gpu else "memory-gather"
    return "bus-copy" if on_gpu else "memory-gather"
