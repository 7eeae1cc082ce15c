"""One battery for every store, codec and cache: same encoded bytes for the same rows, epochs that keep their word, any
address."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torch_engram.stores import (
    CODECS,
    DeviceStore,
    FileRows,
    Plane,
    RecordLayout,
    Store,
    WritableStore,
    make_keys,
    row_index,
)
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.synthetic import synthesise
from torch_engram.stores.tensor_files import tensors_in

ReaderOf = Callable[[Mapping[int, FileRows]], Store]
StoreOf = Callable[[RecordLayout, Mapping[int, int]], WritableStore]
SPACES = {0: 20, 5: 7, 2: 11}
WRITES = st.lists(st.tuples(st.sampled_from([0, 2, 5]), st.sets(st.integers(0, 6), min_size=1), st.integers(0, 255)))
reuse = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)


@pytest.fixture(params=CODECS)
def layout(request: pytest.FixtureRequest) -> RecordLayout:
    return RecordLayout((Plane("value", 35, request.param), Plane("count", 1, "int32"), Plane("other", 2, "int8")))


def all_keys(device: torch.device) -> torch.Tensor:
    return torch.cat([make_keys(space, torch.arange(rows)) for space, rows in SPACES.items()]).to(device)


def test_is_a_writable_store_of_zeros(store_of: StoreOf, layout: RecordLayout, key_device: torch.device) -> None:
    store = store_of(layout, SPACES)
    assert isinstance(store, Store) and isinstance(store, WritableStore)
    assert store.layout == layout and dict(store.spaces) == SPACES and store.acknowledged == 0
    records = store.fetch(all_keys(key_device))
    assert records.device.type == key_device.type and records.dtype == torch.uint8
    assert records.shape == (38, layout.nbytes) and not records.any()


@reuse
@given(WRITES)
def test_reads_back_what_was_written_byte_for_byte(
    store_of: StoreOf, layout: RecordLayout, key_device: torch.device, writes: list[tuple[int, set[int], int]]
) -> None:
    store, expected = store_of(layout, SPACES), {int(key): [0] * layout.nbytes for key in all_keys(torch.device("cpu"))}
    for number, (space, rows, byte) in enumerate(writes, start=1):
        keys = make_keys(space, torch.tensor(sorted(rows)))
        records = (torch.arange(len(keys) * layout.nbytes) + byte).view(len(keys), -1).to(torch.uint8)
        expected.update(zip(keys.tolist(), records.tolist(), strict=True))
        assert store.write(keys.to(key_device), records.to(key_device)) == number
        assert store.acknowledged <= number
    store.flush()
    assert store.acknowledged == len(writes)
    keys = all_keys(key_device).flip(0)
    assert store.fetch(keys).tolist() == [expected[key] for key in keys.tolist()]
    assert store.fetch(keys[:0]).shape == (0, layout.nbytes)
    assert store.fetch(keys[[3, 3, 0]]).tolist() == [expected[key] for key in keys[[3, 3, 0]].tolist()]


def test_what_a_fetch_returns_is_the_callers_own(
    store_of: StoreOf, layout: RecordLayout, key_device: torch.device
) -> None:
    store, keys = store_of(layout, SPACES), make_keys(0, torch.tensor([4])).to(key_device)
    store.fetch(keys).fill_(9)
    assert not store.fetch(keys).any()


def test_a_fetch_sees_every_acknowledged_write(
    store_of: StoreOf, layout: RecordLayout, key_device: torch.device
) -> None:
    store, keys = store_of(layout, SPACES), make_keys(0, torch.arange(20)).to(key_device)
    for _ in range(100):
        number = store.write(
            keys, torch.full((20, layout.nbytes), (store.acknowledged + 1) % 256, dtype=torch.uint8, device=key_device)
        )
        seen = store.acknowledged
        newest = store.fetch(keys)
        assert seen <= number
        assert bool((newest[:, 0] == newest[0, 0]).all()) or seen < number
    store.flush()
    assert store.acknowledged == 100


@reuse
@given(WRITES, WRITES)
def test_knows_the_rows_that_changed_since_they_were_saved(
    store_of: StoreOf, layout: RecordLayout, key_device: torch.device, before: list[Any], after: list[Any]
) -> None:
    store, ever = store_of(layout, SPACES), {space: set() for space in SPACES}
    for number, writes in enumerate((before, after)):
        assert store.counts_from == number
        for space, rows, byte in writes:
            keys = make_keys(space, torch.tensor(sorted(rows))).to(key_device)
            store.write(keys, torch.full((len(rows), layout.nbytes), byte, dtype=torch.uint8, device=key_device))
        store.flush()
        for space in SPACES:
            expected = set().union(*(rows for written, rows, _ in writes if written == space))
            assert store.changed(space).tolist() == sorted(expected)
            ever[space] |= expected
            assert store.written(space).tolist() == sorted(ever[space])
        assert store.forget_changes() == number + 1
    assert not any(len(store.changed(space)) for space in SPACES)
    assert all(store.written(space).tolist() == sorted(rows) for space, rows in ever.items())


def test_marks_are_looked_at_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_index, "_PIECE", 4)
    layout = RecordLayout((Plane("value", 1, "fp32"),))
    store, rows = DeviceStore(layout, SPACES, "cpu"), torch.tensor([0, 3, 4, 9, 10])
    store.write(make_keys(2, rows), layout.empty(5))
    store.forget_changes()
    store.write(make_keys(2, rows[2:4]), layout.empty(2))
    assert store.changed(2).tolist() == [4, 9] and store.written(2).tolist() == rows.tolist()
    assert not len(store.written(0)) and not len(store.written(5))


def test_a_failed_write_is_told_at_the_barrier_at_the_latest(
    store_of: StoreOf, layout: RecordLayout, key_device: torch.device
) -> None:
    if key_device.type == "cuda":
        return  # an index error there ends the process's CUDA context
    store = store_of(layout, {0: 4})
    outside = make_keys(0, torch.tensor([99]))
    for attempt in range(3):  # and every time, so that nobody saves rows that were not written
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            if not attempt or isinstance(getattr(store, "store", store), DeviceStore):
                store.write(outside, layout.empty(1))
            store.flush()


# -- stores of tables in files -----------------------------------------------------------------------------------------


def tables_in(folder: Path, codec: str) -> dict[int, FileRows]:
    """Tables 0, 5 and 2 of 20, 7 and 11 random rows."""
    found = {}
    for space, rows in SPACES.items():
        synthesise(folder / str(space), "plain", rows, 33, codec, seed=space)
        (table,) = find_tables(tensors_in(folder / str(space)))
        found[space] = FileRows.of(table)
    return found


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "fp8", "int8"])
def test_every_reader_gives_the_bytes_of_the_files(reader_of: ReaderOf, tmp_path: Path, codec: str) -> None:
    tables = tables_in(tmp_path, codec)
    store = reader_of(tables)
    assert isinstance(store, Store) and not isinstance(store, WritableStore)
    assert dict(store.spaces) == SPACES and store.layout == tables[0].layout
    keys = all_keys(torch.device("cpu"))
    every = torch.cat([table.read(0, table.rows) for table in tables.values()])
    for order in (range(38), range(37, -1, -1), [3, 3, 0, 37, 20, 3], [25], []):
        wanted = torch.tensor(list(order), dtype=torch.int64)
        assert torch.equal(store.fetch(keys[wanted]), every[wanted])
    store.fetch(keys).fill_(9)
    assert torch.equal(store.fetch(keys), every)


@pytest.mark.parametrize(
    "space, row, what", [(0, 20, "Row 20 "), (2, 11, "Row 11 "), (5, 2**40 - 1, "Row 1,099,511,627,775 "),
    (1, 0, "no table with number 1 "), (6, 0, "no table with number 6 "), (-1, 5, "no table with number -1 ")],
)  # fmt: skip
def test_every_reader_refuses_what_is_not_there(
    reader_of: ReaderOf, tmp_path: Path, space: int, row: int, what: str
) -> None:
    store, outside = reader_of(tables_in(tmp_path, "bf16")), make_keys(space, torch.tensor([row]))
    for keys in (outside, torch.cat((all_keys(torch.device("cpu")), outside)).sort().values):
        with pytest.raises(ValueError, match=what):
            store.fetch(keys)
