"""Tables read in place by every way there is: the bytes of the files in any order, bounded, and never a wrong row."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.stores import DiskStore, Plane, RecordLayout, Store, WritableStore, disk, make_keys, save_table
from torch_engram.stores.aio import AioTransfer
from torch_engram.stores.block_reads import BLOCK, BlockReader, ThreadTransfer
from torch_engram.stores.file_rows import FileRows
from torch_engram.stores.map_reads import MapReader
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.open_files import unreadable
from torch_engram.stores.parts import update_table
from torch_engram.stores.row_reads import ThreadReader
from torch_engram.stores.synthetic import LAYOUTS, synthesise
from torch_engram.stores.tensor_files import encode_header, tensors_in

SMALLEST = 24 * BLOCK
"""Staging that makes many pieces of every fetch."""


def tables(folder: Path) -> dict[int, FileRows]:
    return {space: FileRows.of(table) for space, table in enumerate(find_tables(tensors_in(folder)))}


def unavailable(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@contextmanager
def way(name: str) -> Iterator[bool]:
    """Let stores read in one way only; whether it is a direct one."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if name.startswith("threads"):
            warnings.simplefilter("ignore")
            patch.setattr(disk, "MapReader" if name == "threads" else "AioTransfer", unavailable)
        yield "direct" in name


WAYS = {
    "cached": MapReader, "threads": ThreadReader, "direct": BlockReader, "threads, direct": BlockReader
}  # fmt: skip


@pytest.fixture(params=WAYS)
def store_of(request: pytest.FixtureRequest) -> Callable[..., DiskStore]:
    def make(found: dict[int, FileRows], staging: int = SMALLEST) -> DiskStore:
        with way(request.param) as direct:
            store = DiskStore(found, direct, staging)
        assert type(store._reader) is WAYS[request.param]
        if isinstance(store._reader, BlockReader):
            wanted = ThreadTransfer if "threads" in request.param else AioTransfer
            assert type(store._reader._transfer) is wanted
        return store

    return make


Make = Callable[..., DiskStore]
few = settings(max_examples=15)


@pytest.fixture(scope="module", params=[*LAYOUTS, "plain-fp32", "plain-fp16", "plain-int8", "plain-fp8", "saved"])
def on_disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, FileRows]:
    """Two tables of every layout and codec, with what their rows are."""
    folder, found = tmp_path_factory.mktemp("tables"), {}
    for space, rows in ((0, 700), (3, 41)):
        here = folder / str(space)
        if request.param == "saved":
            found[space] = saved(here, rows)
            continue
        layout, _, codec = (
            request.param.partition("-") if request.param.startswith("plain") else (request.param, "", "")
        )
        width = 70 if layout == "plain" else LAYOUTS[layout].width
        shards = 7 if layout == "qwen4exp" else 1
        synthesise(here, layout, rows, width, codec or LAYOUTS[layout].codec, shards=shards, seed=space)
        found[space] = tables(here)[0]
    return found


def saved(folder: Path, rows: int) -> FileRows:
    layout = RecordLayout((Plane("value", 30), Plane("count", 1, "int32")))
    records = torch.randint(256, (rows, layout.nbytes), dtype=torch.uint8)
    records[:, 124:] = 0
    manifest = save_table(folder, rows, layout, records.__getitem__, 99)
    changed = torch.arange(3, rows, 5)
    records[changed, :124] = torch.randint(256, (len(changed), 124), dtype=torch.uint8)
    return FileRows.saved(folder, update_table(folder, manifest, changed, layout, records.__getitem__), layout)


def all_keys(store: Store) -> Tensor:
    return torch.cat([make_keys(space, torch.arange(rows)) for space, rows in store.spaces.items()])


def test_every_table_by_every_way_is_byte_for_byte_that_of_the_files(
    store_of: Make, on_disk: dict[int, FileRows]
) -> None:
    expected = torch.cat([table.read(0, table.rows) for table in on_disk.values()])
    store = store_of(on_disk)
    assert isinstance(store, Store) and not isinstance(store, WritableStore)
    keys = all_keys(store)
    assert dict(store.spaces) == {0: 700, 3: 41} and store.layout.nbytes == expected.shape[1]
    assert torch.equal(store.fetch(keys), expected)
    for _ in range(2):
        asked = torch.randint(len(keys), (int(torch.randint(1, 500, ())),))  # in any order, some more than once
        assert torch.equal(store.fetch(keys[asked]), expected[asked])
    sparse = torch.arange(0, len(keys), 37)
    assert torch.equal(store_of(on_disk, disk.STAGING).fetch(keys[sparse]), expected[sparse])
    assert store.fetch(keys[:0]).shape == (0, store.layout.nbytes)
    store.fetch(keys).fill_(9)  # what a fetch returns is the caller's own
    assert torch.equal(store.fetch(keys), expected)


@few
@given(
    st.integers(1, 9000), st.integers(1, 12), st.lists(st.integers(0, 11), min_size=1, max_size=9), st.integers(1, 3)
)
def test_rows_of_any_size_at_any_byte(
    tmp_path_factory: pytest.TempPathFactory, width: int, rows: int, asked: list[int], blocks: int
) -> None:
    file = tmp_path_factory.mktemp("tables") / "table.safetensors"
    content = torch.randint(256, (rows, width), dtype=torch.uint8)
    text = encode_header({"other": (torch.uint8, (width % 5, 1)), "table.weight": (torch.int8, (rows, width)),
                          "table.scale": (torch.float32, (rows, 1))})  # fmt: skip
    file.write_bytes(text + bytes(width % 5) + content.numpy().tobytes() + bytes(4 * rows))
    keys = torch.tensor([row % rows for row in asked])
    for name in WAYS:
        with way(name) as direct:
            store = DiskStore(tables(file), direct, blocks * BLOCK)
        assert torch.equal(store.fetch(keys)[:, :width], content[keys]), name


def test_a_large_fetch_goes_in_pieces(store_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = one_table(tmp_path)
    store, sizes = store_of(found), []
    read = store._reader.read

    def note(files: Any, number: Any, starts: Any, nbytes: int, target: Any) -> None:
        sizes.append(len(target))
        read(files, number, starts, nbytes, target)

    monkeypatch.setattr(store._reader, "read", note)
    store.fetch(torch.arange(900))
    assert max(sizes) <= SMALLEST and sum(sizes) == 900 * 128 and len(sizes) > 1


def test_rows_past_2_to_the_31(store_of: Make, tmp_path: Path) -> None:
    rows = 2**31 + 9
    file = tmp_path / "table.safetensors"
    header = encode_header({"table.weight": (torch.bfloat16, (rows, 2))})  # bytes past 2**33
    ends = torch.tensor([0, 1, 2**29, 2**30 - 1, 2**31 - 1, 2**31, rows - 1])
    with open(file, "wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + 4 * rows)  # holes read as zeros
        for row in ends.tolist():
            os.pwrite(opened.fileno(), (row % 251 + 1).to_bytes(4, "little"), len(header) + 4 * row)
    store = store_of(tables(file))
    assert store.fetch(ends)[:, 0].tolist() == [row % 251 + 1 for row in ends.tolist()]
    assert not store.fetch(torch.tensor([2, 2**30, rows - 2])).any()


@pytest.mark.gpu
def test_records_arrive_on_the_keys_device(on_disk: dict[int, FileRows]) -> None:
    for direct in (False, True):
        store = DiskStore(on_disk, direct, SMALLEST)
        keys = all_keys(store).flip(0)
        found = store.fetch(keys.cuda())
        assert found.is_cuda and torch.equal(found.cpu(), store.fetch(keys))


def test_rows_and_spaces_that_are_not_there_are_named(store_of: Make, tmp_path: Path) -> None:
    on_disk = {0: one_table(tmp_path / "a", 700)[0][0], 3: one_table(tmp_path / "b", 41)[0][0]}
    store = store_of(on_disk)
    for space, row in ((0, 700), (3, 41), (0, 2**39)):
        with pytest.raises(ValueError, match=f"Row {row:,} is not in .* which has {store.spaces[space]:,} rows"):
            store.fetch(make_keys(space, torch.tensor([0, row])))
    for key in (int(make_keys(1, torch.tensor(0))), -1):
        with pytest.raises(ValueError, match=r"no table with number -?\d+ here: ask for 0, 3"):
            store.fetch(torch.tensor([0, key]))
    other = FileRows(on_disk[0].name, 0, RecordLayout((Plane("value", 1),)), {}, [])
    with pytest.raises(ValueError, match="2 kinds of records in one store"):
        DiskStore({0: on_disk[0], 1: other})


# -- faults -----------------------------------------------------------------------------------------------------------


def one_table(folder: Path, rows: int = 900) -> tuple[dict[int, FileRows], Path]:
    synthesise(folder / "table", "plain", rows, 64, "bf16")
    found = tables(folder / "table")
    return found, found[0].files[0].path


def test_a_file_that_is_truncated_while_in_use_is_named_and_ends_no_process(store_of: Make, tmp_path: Path) -> None:
    found, file = one_table(tmp_path)
    size = file.stat().st_size
    store, unused = store_of(found), store_of(found)
    store.fetch(torch.arange(900))  # its pages are mapped by now
    os.truncate(file, size - 1)
    with pytest.raises(OSError, match="was changed while it was in use"):
        unused.fetch(torch.arange(900))
    for left in (size - 1, size // 2, 0):
        os.truncate(file, left)
        for keys in (torch.arange(900), torch.tensor([899]), torch.tensor([0])):
            with pytest.raises(OSError, match=r"table-00000\.safetensors was changed while it was in use"):
                store.fetch(keys)


def test_a_file_that_is_written_to_in_place_is_refused(store_of: Make, tmp_path: Path) -> None:
    found, file = one_table(tmp_path)
    store = store_of(found)
    store.fetch(torch.tensor([3]))
    with open(file, "r+b") as opened:
        opened.seek(file.stat().st_size - 64 * 2 * 3)
        opened.write(b"another row")
    with pytest.raises(OSError, match="was changed while it was in use"):
        store.fetch(torch.tensor([897]))


def test_a_file_that_is_deleted_or_replaced_is_still_the_same(store_of: Make, tmp_path: Path) -> None:
    found, file = one_table(tmp_path)
    expected = found[0].read(0, 900)
    store = store_of(found)
    synthesise(tmp_path / "other", "plain", 900, 64, "bf16", seed=7)
    os.replace(tmp_path / "other" / file.name, file)
    assert torch.equal(store.fetch(torch.arange(900)), expected)
    file.unlink()
    assert torch.equal(store.fetch(torch.arange(900)), expected)


def test_a_read_error_half_way_names_file_and_byte_and_the_next_fetch_is_whole(
    store_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, file = one_table(tmp_path)
    store, expected, table_file = store_of(found), found[0].read(0, 900), found[0].files[0]
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
    store_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    found, _ = one_table(tmp_path)
    expected = found[0].read(0, 900)
    store = store_of(found)
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


def test_threads_may_share_a_store(store_of: Make, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    found, _ = one_table(tmp_path)
    store, expected = store_of(found), found[0].read(0, 900)
    asked = [torch.randint(900, (200,)) for _ in range(20)]
    with ThreadPoolExecutor(4) as pool:
        for keys, records in zip(asked, pool.map(store.fetch, asked), strict=True):
            assert torch.equal(records, expected[keys])
