"""Files that end, change, vanish or cannot be read while they are served, and systems that lack a way to read them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from disk_ways import one_table, unavailable

from torch_engram.stores import (
    DiskStore,
    disk,
)
from torch_engram.stores.block_reads import BlockReader
from torch_engram.stores.map_reads import MapReader
from torch_engram.stores.open_files import unreadable
from torch_engram.stores.synthetic import synthesise

Make = Callable[..., DiskStore]


def test_a_file_that_is_truncated_while_in_use_is_named_and_ends_no_process(
    disk_store_of: Make, tmp_path: Path
) -> None:
    found, file = one_table(tmp_path)
    size = file.stat().st_size
    store, unused = disk_store_of(found), disk_store_of(found)
    store.fetch(torch.arange(900))  # its pages are mapped by now
    os.truncate(file, size - 1)
    with pytest.raises(OSError, match="was changed while it was in use"):
        unused.fetch(torch.arange(900))
    for left in (size - 1, size // 2, 0):
        os.truncate(file, left)
        for keys in (torch.arange(900), torch.tensor([899]), torch.tensor([0])):
            with pytest.raises(OSError, match=r"table-00000\.safetensors was changed while it was in use"):
                store.fetch(keys)


def test_a_file_that_is_written_to_in_place_is_refused(disk_store_of: Make, tmp_path: Path) -> None:
    found, file = one_table(tmp_path)
    store = disk_store_of(found)
    store.fetch(torch.tensor([3]))
    with open(file, "r+b") as opened:
        opened.seek(file.stat().st_size - 64 * 2 * 3)
        opened.write(b"another row")
    with pytest.raises(OSError, match="was changed while it was in use"):
        store.fetch(torch.tensor([897]))


def test_a_file_that_is_deleted_or_replaced_is_still_the_same(disk_store_of: Make, tmp_path: Path) -> None:
    found, file = one_table(tmp_path)
    expected = found[0].read(0, 900)
    store = disk_store_of(found)
    synthesise(tmp_path / "other", "plain", 900, 64, "bf16", seed=7)
    os.replace(tmp_path / "other" / file.name, file)
    assert torch.equal(store.fetch(torch.arange(900)), expected)
    file.unlink()
    assert torch.equal(store.fetch(torch.arange(900)), expected)


def test_a_read_error_half_way_names_file_and_byte_and_the_next_fetch_is_whole(
    disk_store_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, file = one_table(tmp_path)
    store, expected, table_file = disk_store_of(found), found[0].read(0, 900), found[0].files[0]
    reader = store._reader
    folder = os.open(tmp_path, os.O_RDONLY)  # reading a folder fails, as a disk would
    with monkeypatch.context() as patch:
        if isinstance(reader, BlockReader):
            patch.setitem(reader._direct, table_file, folder)
        elif isinstance(reader, MapReader):
            patch.setattr(reader, "_pwritev", lambda *_: -1)
            patch.setattr(reader, "_waits", False)
            patch.setattr(table_file, "read_into", lambda at, target: broken(file, at))
        else:
            patch.setattr(table_file, "read_into", lambda at, target: broken(file, at))
        with pytest.raises(OSError, match=r"at byte [\d,]+: check the disk.*table-00000\.safetensors"):
            store.fetch(torch.arange(0, 900, 2))
    os.close(folder)
    assert torch.equal(store.fetch(torch.arange(900)), expected)


def broken(file: Path, at: int) -> None:
    raise unreadable(file, at, errno.EIO)


@pytest.mark.parametrize("most", [0, 1, 100, 5000])
def test_what_the_system_reads_in_pieces_is_read_whole(
    disk_store_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    found, _ = one_table(tmp_path)
    expected = found[0].read(0, 900)
    store = disk_store_of(found)
    reader = store._reader
    if isinstance(reader, BlockReader):
        real = reader._transfer
        monkeypatch.setattr(reader, "_transfer", lambda *arguments: np.minimum(real(*arguments), most))
    elif isinstance(reader, MapReader):
        copy = reader._pwritev
        monkeypatch.setattr(reader, "_pwritev", lambda *arguments: min(copy(*arguments), most))
    else:
        read = os.preadv
        monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [views[0][: most or 7]], at))
    for keys in (torch.arange(900), torch.arange(0, 900, 7)):
        assert torch.equal(store.fetch(keys), expected[keys])


def test_without_direct_or_asynchronous_reads_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = one_table(tmp_path)
    expected = found[0].read(0, 900)
    for name, broken_by, error in (
        ("open_direct", unavailable, "table-00000.safetensors has no direct reads"),
        ("AioTransfer", unavailable, "There are no asynchronous reads here"),
    ):
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match=error) as told:
            patch.setattr(disk, name, broken_by)
            store = DiskStore(found, direct=True)
            assert torch.equal(store.fetch(torch.arange(900)), expected)
        assert len(told) == 1
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="There are no memory files here") as told:
        patch.delattr(os, "memfd_create")
        assert torch.equal(DiskStore(found).fetch(torch.arange(900)), expected)
    assert len(told) == 1


def test_a_file_system_without_direct_reads_is_read_through_the_cache() -> None:
    shared = Path("/proc/self/net/dev")  # opens for direct reads nowhere
    file = type("Opened", (), {"descriptor": os.open(shared, os.O_RDONLY), "path": shared})
    with pytest.raises(OSError):
        disk.open_direct(file)  # type: ignore[arg-type]
    os.close(file.descriptor)  # type: ignore[attr-defined]


def test_a_system_that_is_not_linux_reads_with_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = one_table(tmp_path)
    expected = found[0].read(0, 900)
    monkeypatch.setattr(sys, "platform", "darwin")
    for name in ("memfd_create", "O_DIRECT", "posix_fadvise", "posix_fallocate"):
        monkeypatch.delattr(os, name)
    assert torch.equal(DiskStore(found).fetch(torch.arange(900)), expected)
    with pytest.warns(UserWarning, match="has no direct reads") as told:
        assert torch.equal(DiskStore(found, direct=True).fetch(torch.arange(900)), expected)
    assert len(told) == 1


FORBIDDEN = """
import ctypes, struct, sys, torch
from pathlib import Path
from torch_engram.stores import DiskStore
from torch_engram.stores.file_rows import FileRows
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.open_files import unreadable
from torch_engram.stores.tensor_files import tensors_in

def op(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
forbidden = [206, 319]  # io_setup, memfd_create
program = op(0x20, 0, 0, 0)
for call in forbidden: program += op(0x15, 0, 1, call) + op(0x06, 0, 0, 0x00050001)
program += op(0x06, 0, 0, 0x7fff0000)
held = ctypes.create_string_buffer(program)
class Prog(ctypes.Structure): _fields_ = [("n", ctypes.c_ushort), ("at", ctypes.c_void_p)]
prog = Prog(len(program) // 8, ctypes.addressof(held))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(prog), 0, 0) == 0
(table,) = find_tables(tensors_in(Path(sys.argv[1])))
rows = FileRows.of(table)
for direct in (False, True):
    assert torch.equal(DiskStore({0: rows}, direct).fetch(torch.arange(rows.rows)), rows.read(0, rows.rows))
"""


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="numbers of system calls")
def test_a_container_that_forbids_the_system_calls_gets_threads_and_a_warning(tmp_path: Path) -> None:
    one_table(tmp_path)
    command = [sys.executable, "-c", FORBIDDEN, str(tmp_path / "table")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 2
    assert "There are no memory files here ([Errno 1]" in done.stderr
    assert "There are no asynchronous reads here ([Errno 1]" in done.stderr


def test_threads_may_share_a_store(disk_store_of: Make, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    found, _ = one_table(tmp_path)
    store, expected = disk_store_of(found), found[0].read(0, 900)
    asked = [torch.randint(900, (200,)) for _ in range(20)]
    with ThreadPoolExecutor(4) as pool:
        for keys, records in zip(asked, pool.map(store.fetch, asked), strict=True):
            assert torch.equal(records, expected[keys])
