"""Tables read in place by every way there is: the bytes of the files in any order, bounded, and never a wrong row."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_ways import SMALLEST, WAYS, one_table, read_by, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.stores import (
    DiskStore,
    LoadedStore,
    Plane,
    RecordLayout,
    Store,
    WritableStore,
    disk,
    loaded,
    make_keys,
    save_table,
)
from torch_engram.stores.block_reads import BLOCK
from torch_engram.stores.file_rows import FileRows
from torch_engram.stores.open_files import OpenFile
from torch_engram.stores.parts import update_table
from torch_engram.stores.synthetic import LAYOUTS, synthesise
from torch_engram.stores.tensor_files import TensorWriter, encode_header

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
        synthesise(here, layout, rows, width, codec or LAYOUTS[layout].codecs[0], shards=shards, seed=space)
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


def test_tensors_in_any_order_of_a_file(disk_store_of: Make, tmp_path: Path) -> None:
    """The later rows lie first, so that ascending rows go back within a block and across one."""
    name = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding.shard_{}.weight"
    later, earlier = torch.randn(5, 160).bfloat16(), torch.randn(20, 160).bfloat16()
    kinds = {name.format(1): (later.dtype, (5, 160)), name.format(0): (earlier.dtype, (20, 160))}
    with open(tmp_path / "a.safetensors", "wb") as file:
        writer = TensorWriter(file, kinds)
        writer.put(name.format(1), 0, later)
        writer.put(name.format(0), 0, earlier)
    store = disk_store_of({0: tables(tmp_path)[0]})
    every = torch.cat((earlier, later)).view(torch.uint8)
    for pair in product(range(20), range(20, 25)):
        assert torch.equal(store.fetch(make_keys(0, torch.tensor(pair))), every[list(pair)])


def all_keys(store: Store) -> Tensor:
    return torch.cat([make_keys(space, torch.arange(rows)) for space, rows in store.spaces.items()])


def test_every_table_by_every_way_is_byte_for_byte_that_of_the_files(
    disk_store_of: Make, on_disk: dict[int, FileRows]
) -> None:
    expected = torch.cat([table.read(0, table.rows) for table in on_disk.values()])
    store = disk_store_of(on_disk)
    assert isinstance(store, Store) and not isinstance(store, WritableStore)
    keys = all_keys(store)
    assert dict(store.spaces) == {0: 700, 3: 41} and store.layout.nbytes == expected.shape[1]
    assert torch.equal(store.fetch(keys), expected)
    for _ in range(2):
        asked = torch.randint(len(keys), (int(torch.randint(1, 500, ())),))  # in any order, some more than once
        assert torch.equal(store.fetch(keys[asked]), expected[asked])
    sparse = torch.arange(0, len(keys), 37)
    assert torch.equal(disk_store_of(on_disk, disk.STAGING).fetch(keys[sparse]), expected[sparse])
    assert store.fetch(keys[:0]).shape == (0, store.layout.nbytes)
    store.fetch(keys).fill_(9)  # what a fetch returns is the caller's own
    assert torch.equal(store.fetch(keys), expected)


def test_loaded_tables_are_byte_for_byte_those_of_the_files(
    on_disk: dict[int, FileRows], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(loaded, "_CHUNK_ROWS", 64)
    expected = torch.cat([table.read(0, table.rows) for table in on_disk.values()])
    store = LoadedStore(on_disk, on_disk[0].layout, device)
    assert isinstance(store, Store) and not isinstance(store, WritableStore)
    keys = all_keys(store).flip(0).to(device)
    assert torch.equal(store.fetch(keys).cpu(), expected.flip(0))


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
        store = read_by(name, tables(file), blocks * BLOCK)
        assert torch.equal(store.fetch(keys)[:, :width], content[keys]), name


def test_a_large_fetch_goes_in_pieces(disk_store_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = one_table(tmp_path)
    store, sizes = disk_store_of(found), []
    read = store._reader.read

    def note(files: Any, wanted: Any) -> None:
        sizes.append(wanted.size)
        read(files, wanted)

    monkeypatch.setattr(store._reader, "read", note)
    store.fetch(torch.arange(900))
    assert max(sizes) <= SMALLEST and sum(sizes) == 900 * 128 and len(sizes) > 1


def test_all_components_are_one_read_and_every_file_is_looked_at_once(
    disk_store_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesise(tmp_path / "table", "deepseek-v4.1", 900, 256, "fp8")
    found = tables(tmp_path / "table")
    store, reads, looks = disk_store_of(found, disk.STAGING), [], []
    read, look = store._reader.read, OpenFile.require_unchanged
    monkeypatch.setattr(store._reader, "read", lambda *asked: (reads.append(asked), read(*asked)))
    store.fetch(torch.tensor([1]))  # what is done once for every file
    reads.clear()
    monkeypatch.setattr(OpenFile, "require_unchanged", lambda file: (looks.append(file), look(file)))
    store.fetch(torch.arange(899, 0, -60))
    assert len(reads) == 1 and len(found[0].columns) == 2
    monkeypatch.setattr(store, "_room", 7)
    store.fetch(torch.arange(900))
    assert len(reads) == 1 + 129 and looks == [*found[0].files] * 2


def test_rows_past_2_to_the_31(disk_store_of: Make, tmp_path: Path) -> None:
    rows = 2**31 + 9
    file = tmp_path / "table.safetensors"
    header = encode_header({"table.weight": (torch.bfloat16, (rows, 2))})  # bytes past 2**33
    ends = torch.tensor([0, 1, 2**29, 2**30 - 1, 2**31 - 1, 2**31, rows - 1])
    with open(file, "wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + 4 * rows)  # holes read as zeros
        for row in ends.tolist():
            os.pwrite(opened.fileno(), (row % 251 + 1).to_bytes(4, "little"), len(header) + 4 * row)
    store = disk_store_of(tables(file))
    assert store.fetch(ends)[:, 0].tolist() == [row % 251 + 1 for row in ends.tolist()]
    assert not store.fetch(torch.tensor([2, 2**30, rows - 2])).any()


@pytest.mark.gpu
def test_records_arrive_on_the_keys_device(on_disk: dict[int, FileRows]) -> None:
    for direct in (False, True):
        store = DiskStore(on_disk, direct, SMALLEST)
        keys = all_keys(store).flip(0)
        found = store.fetch(keys.cuda())
        assert found.is_cuda and torch.equal(found.cpu(), store.fetch(keys))


def test_rows_and_spaces_that_are_not_there_are_named(disk_store_of: Make, tmp_path: Path) -> None:
    on_disk = {0: one_table(tmp_path / "a", 700)[0][0], 3: one_table(tmp_path / "b", 41)[0][0]}
    store = disk_store_of(on_disk)
    for space, row in ((0, 700), (3, 41), (0, 2**39)):
        with pytest.raises(ValueError, match=f"Row {row:,} is not in .* which has {store.spaces[space]:,} rows"):
            store.fetch(make_keys(space, torch.tensor([0, row])))
    for key in (int(make_keys(1, torch.tensor(0))), -1):
        with pytest.raises(ValueError, match=r"no table with number -?\d+ here: ask for 0, 3"):
            store.fetch(torch.tensor([0, key]))
    other = FileRows(on_disk[0].name, 0, RecordLayout((Plane("value", 1),)), {}, [])
    with pytest.raises(ValueError, match="2 kinds of records in one store"):
        DiskStore({0: on_disk[0], 1: other})
