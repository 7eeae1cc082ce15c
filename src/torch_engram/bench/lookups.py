"""Lookups from token ids on the host to the embeddings of all layers, on a bank that is only read: how long they take.

What is read, :mod:`torch_engram.bench.excerpts` says. Nothing is overlapped. A bank whose embeddings are not those of
the rows in the files is not timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torch_engram.bench.cache_hits import Hits
from torch_engram.bench.excerpts import WARM_UP, Excerpts, Mode
from torch_engram.bench.results import Measurement
from torch_engram.bench.timing import median
from torch_engram.memory import MemoryBank, Tokens
from torch_engram.stores import DiskStore, FileRows, NgramCache, RowFormat, make_keys


@dataclass(frozen=True)
class Read:
    """What one read took, and what a bank can say of it."""

    microseconds: float
    distinct: float
    """Share of its rows that are distinct."""
    from_disk: float | None
    """MB that came from the disk; None where the system does not say."""

    @classmethod
    def take(cls, bank: MemoryBank, tokens: Tokens) -> Read:
        """From token ids on the host until the embeddings of all layers are there."""
        before = _bytes_from_disk()
        _synchronize(bank.device)
        start = time.perf_counter()
        rows = bank.prefetch(tokens)
        for layer in bank.config.layers:
            rows[0].wait(layer)
        _synchronize(bank.device)
        took = 1e6 * (time.perf_counter() - start)
        after = _bytes_from_disk()
        distinct = rows.touched / rows_asked(bank, tokens.ids.numel())
        rows.discard()
        return cls(took, distinct, None if before is None or after is None else (after - before) / 1e6)


@dataclass(frozen=True)
class LookupTimes:
    """What the reads of one mode took under one placement."""

    placement: str
    mode: Mode
    reads: list[Read]
    rows: int
    """Rows that a read asks for: tokens times columns, over all layers."""
    row_bytes: int
    limit: Measurement | None
    hits: Hits | None = None
    """What a cache found; None without one."""

    @property
    def microseconds(self) -> list[float]:
        """Of every read."""
        return [read.microseconds for read in self.reads]

    @property
    def distinct(self) -> list[float]:
        """Share of rows, of every read."""
        return [read.distinct for read in self.reads]

    @property
    def from_disk(self) -> list[float] | None:
        """MB of every read; None where the system does not say."""
        found = [read.from_disk for read in self.reads if read.from_disk is not None]
        return found or None

    @property
    def p99(self) -> float:
        """Microseconds that one read in a hundred exceeds."""
        return float(np.quantile(self.microseconds, 0.99))

    @property
    def rows_per_second(self) -> list[float]:
        """Rows that were asked for, duplicates counted."""
        return [1e6 * self.rows / took for took in self.microseconds]

    @property
    def delivered(self) -> list[float]:
        """GB/s: those rows' bytes."""
        return [1e-9 * self.row_bytes * rate for rate in self.rows_per_second]

    @property
    def ratio(self) -> float | None:
        """Delivered over the limit."""
        return None if self.limit is None else median(self.delivered) / median(list(self.limit.samples))

    def measurements(self) -> Iterator[Measurement]:
        """All there are."""
        yield Measurement("read", self.microseconds, "us")
        yield Measurement("p99", [self.p99], "us")
        yield Measurement("rows", self.rows_per_second, "rows/s")
        reference = None if self.limit is None else median(list(self.limit.samples))
        yield Measurement("delivered", self.delivered, "GB/s", reference, self.ratio)
        yield Measurement("distinct", self.distinct, "of rows")
        if self.from_disk is not None:
            yield Measurement("from-disk", self.from_disk, "MB")
        if self.hits is not None:
            yield from self.hits.measurements()


def time_lookups(
    bank: MemoryBank, placement: str, mode: Mode, excerpts: Excerpts, limit: Measurement | None, cold: bool = False
) -> LookupTimes:
    """Time one mode on a bank. ``cold``: what the system keeps of the files in memory is dropped before every read."""
    history, before = bank.new_history(), bank.cache_counts()
    reads: list[Read] = []
    for ids, doc_start in excerpts.reads(mode):
        if len(reads) == WARM_UP:
            before = bank.cache_counts()
        if cold:
            drop_pages(bank)
        reads.append(Read.take(bank, Tokens(ids, doc_start=doc_start, history=history)))
    hits = Hits.between(before, bank.cache_counts())
    fields = bank.source(bank.tables[0]).store.layout.fields
    row_bytes = sum(field.component.nbytes for field in fields)
    asked = rows_asked(bank, mode.sequences * mode.length)
    return LookupTimes(placement, mode, reads[WARM_UP:], asked, row_bytes, limit, hits)


def warm_cache(bank: MemoryBank, excerpts: Excerpts) -> None:
    """Fill a bank's cache with rows of the text before that which is timed."""
    history = bank.new_history()
    for ids, doc_start in excerpts.warming():
        memory = bank.read(Tokens(ids, doc_start=doc_start, history=history))
        for layer in bank.config.layers:
            memory.wait(layer)


def rows_asked(bank: MemoryBank, tokens: int) -> int:
    """Rows that so many tokens want, over all layers, duplicates counted."""
    return tokens * bank.config.columns * len(bank.config.layers)


def drop_pages(bank: MemoryBank) -> None:
    """Let the system forget what it keeps in memory of files that a bank reads in place; a bank's cache stays."""
    for store in {bank.source(table).store for table in bank.tables}:
        store = store.store if isinstance(store, NgramCache) else store
        if isinstance(store, DiskStore):
            store.drop_pages()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes_from_disk() -> int | None:
    """Bytes that this process has had the disk read so far; None where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), None)


def require_cold() -> None:
    """Raises ``ValueError`` where a system cannot be told to drop pages."""
    if not hasattr(os, "posix_fadvise"):
        raise ValueError("--cold needs posix_fadvise, which this system does not have: leave it out.")


def require_right(bank: MemoryBank, files: Mapping[int, FileRows], ids: Tensor) -> None:
    """Raises ``ValueError`` when the embeddings of ids ``[1, T]`` are not the rows that the files of each layer hold,
    found by plain addressing and read and decoded one by one."""
    history = bank.new_history()
    pieces = [bank.read(Tokens(piece, history=history)) for piece in ids.split([ids.shape[1] - 1, 1], 1)]
    windows = bank.addressing.windows(ids)
    for table in bank.tables:
        rows = bank.addressing.rows(windows, table.layer)[1][..., table.columns] - table.first_row
        file = files[table.layer]
        records = torch.cat([file.read(row, row + 1) for row in rows.flatten().tolist()])
        values = RowFormat(file.layout).decode(make_keys(table.space, rows.flatten()), records)["value"]
        expected = values.to(bank.dtype).view(*ids.shape, -1)
        found = torch.cat([piece.wait(table.layer)[bank.name] for piece in pieces], 1).cpu()
        if not torch.equal(found, expected):
            raise ValueError(
                f"The rows of layer {table.layer} are not those of {file.name}, so nothing is timed; please report "
                "this with your table, placement and versions."
            )
