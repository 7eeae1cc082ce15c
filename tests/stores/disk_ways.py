"""Tables in files, and disk stores that read them in one way only."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from torch_engram.stores import DiskStore, disk
from torch_engram.stores.aio import AioTransfer
from torch_engram.stores.block_reads import BLOCK, BlockReader, ThreadTransfer
from torch_engram.stores.file_rows import FileRows
from torch_engram.stores.map_reads import MapReader
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.row_reads import ThreadReader
from torch_engram.stores.synthetic import synthesise
from torch_engram.stores.tensor_files import tensors_in

SMALLEST = 24 * BLOCK
"""Staging that makes many pieces of every fetch."""

WAYS = {
    "cached": MapReader, "threads": ThreadReader, "direct": BlockReader, "threads, direct": BlockReader
}  # fmt: skip


def tables(folder: Path) -> dict[int, FileRows]:
    return {space: FileRows.of(table) for space, table in enumerate(find_tables(tensors_in(folder)))}


def one_table(folder: Path, rows: int = 900) -> tuple[dict[int, FileRows], Path]:
    """A table of random rows, and its file."""
    synthesise(folder / "table", "plain", rows, 64, "bf16")
    found = tables(folder / "table")
    return found, found[0].files[0].path


def unavailable(*_: object) -> None:
    """What a system call is that a system does not have."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@contextmanager
def way(name: str) -> Iterator[bool]:
    """Let stores read in one way only; whether it is a direct one."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if name.startswith("threads"):
            warnings.simplefilter("ignore")
            patch.setattr(disk, "MapReader" if name == "threads" else "AioTransfer", unavailable)
        yield "direct" in name


def read_by(name: str, found: dict[int, FileRows], staging: int = SMALLEST) -> DiskStore:
    """A store that reads in this way."""
    with way(name) as direct:
        store = DiskStore(found, direct, staging)
    assert type(store._reader) is WAYS[name]
    if isinstance(store._reader, BlockReader):
        assert type(store._reader._transfer) is (ThreadTransfer if "threads" in name else AioTransfer)
    return store
