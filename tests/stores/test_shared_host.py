"""Tables in host memory that processes share: what they hold, whose they are, and the ways to a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.stores import (
    FileRows,
    LoadedStore,
    Plane,
    RecordLayout,
    SharedHostStore,
    loaded,
    make_keys,
    shared_host,
    shared_memory,
)
from torch_engram.stores.gather import gather_rows
from torch_engram.stores.host_memory import UnifiedMemory
from torch_engram.stores.loaded import reencode
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.recycled import _free, recycled
from torch_engram.stores.shared_memory import Segment
from torch_engram.stores.synthetic import synthesise
from torch_engram.stores.tensor_files import tensors_in

CPU = torch.device("cpu")
ROWS = 30


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files of a test's own."""
    monkeypatch.setattr(shared_memory, "FOLDERS", (tmp_path,))
    return tmp_path


def table_in(folder: Path, seed: int = 0, codec: str = "fp8") -> FileRows:
    if not folder.exists():
        synthesise(folder, "plain", ROWS, 32, codec, seed=seed)
    (table,) = find_tables(tensors_in(folder))
    return FileRows.of(table)


def inode(store: SharedHostStore) -> int:
    assert isinstance(store.table.memory, Segment)
    return os.fstat(store.table.memory.descriptor).st_ino


def test_what_a_store_holds_decides_which_memory_is_shared(tmp_path: Path) -> None:
    table = table_in(tmp_path / "a")
    store = SharedHostStore({0: table}, table.layout)
    again = table_in(tmp_path / "a")
    same = SharedHostStore({0: again}, again.layout)
    bf16 = RecordLayout((Plane("value", 32, "bf16"),))
    synthesise(tmp_path / "b", "plain", ROWS, 32, "fp8")  # the same bytes in another file
    others = [SharedHostStore({0: table}, bf16), SharedHostStore({1: table}, table.layout),
              SharedHostStore({0: table_in(tmp_path / "b")}, table.layout)]  # fmt: skip
    assert inode(same) == inode(store)
    assert len({inode(other) for other in (store, *others)}) == 4
    keys = torch.arange(ROWS)
    assert torch.equal(others[0].fetch(keys), reencode(table.read(0, ROWS), table.layout, bf16))
    assert torch.equal(others[1].fetch(make_keys(1, keys)), table.read(0, ROWS))


def test_a_table_that_is_replaced_is_loaded_anew_and_the_old_one_stays_with_who_has_it(tmp_path: Path) -> None:
    old, new = table_in(tmp_path / "a"), table_in(tmp_path / "b", seed=1)
    store, keys = SharedHostStore({0: old}, old.layout), torch.arange(ROWS)
    before = os.stat(old.files[0].path)
    os.replace(new.files[0].path, old.files[0].path)
    os.utime(old.files[0].path, ns=(before.st_atime_ns, before.st_mtime_ns))
    current = table_in(tmp_path / "a")
    later = SharedHostStore({0: current}, current.layout)
    assert torch.equal(later.fetch(keys), current.read(0, ROWS))
    assert torch.equal(store.fetch(keys), old.read(0, ROWS))
    assert not torch.equal(store.fetch(keys), later.fetch(keys))


def test_a_read_error_while_it_is_filled_is_told_and_nothing_is_shared(tmp_path: Path) -> None:
    table = table_in(tmp_path / "a")
    path = table.files[0].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(OSError, match=r"table-00000\.safetensors was changed while it was in use"):
        SharedHostStore({0: table}, table.layout)
    path.write_bytes(whole)
    table = table_in(tmp_path / "a")
    assert torch.equal(SharedHostStore({0: table}, table.layout).fetch(torch.arange(ROWS)), table.read(0, ROWS))


def test_it_is_filled_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(shared_host, "_PIECE", 7 * 48)
    table, real = table_in(tmp_path / "a"), FileRows.read
    expected = table.read(0, ROWS)
    monkeypatch.setattr(FileRows, "read", lambda self, a, b: (read.append(b - a), real(self, a, b))[1])
    assert table.layout.nbytes == 40 and torch.equal(
        SharedHostStore({0: table}, table.layout).fetch(torch.arange(ROWS)), expected
    )
    assert sum(read) == ROWS and max(read) == 8


@pytest.mark.parametrize("kind", ["host", "loaded"])
@pytest.mark.parametrize("codec", ["fp8", "bf16"])
def test_holes_are_not_read_where_they_are_the_zeros_of_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, codec: str
) -> None:
    monkeypatch.setattr(shared_host, "_PIECE", 1 << 16)
    monkeypatch.setattr(loaded, "_CHUNK_ROWS", 1 << 10)
    rows, real = 20_000, FileRows.read
    read: list[int] = []
    synthesise(tmp_path / "table", "plain", rows, 32, "fp8")
    (named,) = find_tables(tensors_in(tmp_path / "table"))
    whole = named.values[0].file.read_bytes()
    with open(named.values[0].file, "wb") as file:  # the last rows of each component become a hole
        file.write(whole[: named.values[0].start])
        for place in (*named.values, *named.scales):
            file.seek(place.start)
            file.write(whole[place.start : place.start + place.nbytes // 4])
        file.truncate(len(whole))
    table, layout = FileRows.of(named), RecordLayout((Plane("value", 32, codec),))
    expected = reencode(table.read(0, rows), table.layout, layout)
    monkeypatch.setattr(FileRows, "read", lambda self, a, b: (read.append(b - a), real(self, a, b))[1])
    store = SharedHostStore({0: table}, layout) if kind == "host" else LoadedStore({0: table}, layout, CPU)
    assert expected[: rows // 5].any() and torch.equal(store.fetch(torch.arange(rows)), expected)
    assert sum(read) == rows if codec == "bf16" else rows // 4 <= sum(read) < rows * 3 // 4


@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 5000))
def test_rows_are_gathered_byte_for_byte(words: int, rows: int, wanted: int) -> None:
    table = torch.randint(256, (rows, 8 * words)).to(torch.uint8)
    index = torch.randint(rows, (wanted,))
    assert torch.equal(gather_rows(table, index, torch.empty(wanted, 8 * words, dtype=torch.uint8)), table[index])
    for outside in (-1, rows):
        with pytest.raises(IndexError):
            gather_rows(table, torch.tensor([0, outside]), torch.empty(2, 8 * words, dtype=torch.uint8))


def test_memory_of_results_is_used_again_only_when_nobody_holds_them() -> None:
    _free.clear()
    rows = 3 << 20
    first = recycled(rows, 1)
    second = recycled(rows, 1)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    kept, array = first[5:6], second.numpy()
    kept.fill_(7)
    array[5] = 9
    del first, second
    assert recycled(rows, 1).fill_(1).data_ptr() not in places and kept.item() == 7 and array[5] == 9
    del kept, array
    assert {recycled(rows - 1, 1).data_ptr()} < places
    again = [recycled(rows, 1) for _ in range(5)]
    assert len({result.data_ptr() for result in again}) == 5
    again.clear()
    assert len(_free) == 2 and recycled(1 << 20, 4).shape == (1 << 20, 4)
    assert recycled(0, 8).shape == (0, 8) and recycled(7, 8).shape == (7, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
def test_a_gpu_gets_the_same_rows_by_both_ways(tmp_path: Path, shared: bool) -> None:
    table = table_in(tmp_path / "a")
    store, device = SharedHostStore({0: table}, table.layout, shared), torch.device("cuda")
    assert isinstance(store.table.memory, Segment if shared else UnifiedMemory)
    expected = table.read(0, ROWS)
    store.fetch(torch.arange(ROWS, device=device))
    for first in (0, 1 << 62):
        store._reads_of(torch.device("cuda:0"))._division = (first, 0)
        keys = torch.from_numpy(np.random.default_rng(0).permutation(ROWS)).to(device)
        assert torch.equal(store.fetch(keys).cpu(), expected[keys.cpu()])
