"""Touched rows alone on disk: a small folder of a large table, which gives back the very rows, untouched ones too."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_engram.memory import MemoryBank, Tokens, load_bank, open_bank, save_bank
from torch_engram.memory.saved_rows import saved_rows
from torch_engram.optim import RowAdam, RowSinkhorn, RowwiseAdam
from torch_engram.stores import DeviceStore, make_keys, parts

Make = Callable[..., MemoryBank]
Run = Callable[..., list[float]]
Records = Callable[[MemoryBank], list[Tensor]]
BY_ORDER = dict(row_dim=(3, 5), heads=(2, 3), rows_per_head=200)


def some_steps(count: int = 3) -> list[list[Tokens]]:
    return [[Tokens(torch.randint(60, (1, 4)))] for _ in range(count)]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("placement, codec, std, optimizer, loaded_whole", [
    ("device", "fp32", 0.0, RowAdam, False),
    ("device", "bf16", 0.5, partial(RowSinkhorn, weight_decay=1.0, lazy_decay=True), True),
    ("host", "bf16", 0.0, RowwiseAdam, True),
    ("disk", "fp32", 0.5, RowAdam, False),
])  # fmt: skip
def test_a_bank_of_any_kind_comes_back_exactly(
    make_bank: Make,
    train: Run,
    every_record: Records,
    stores: dict[str, Any],
    tmp_path: Path,
    placement: str,
    codec: str,
    std: float,
    optimizer: Any,
    loaded_whole: bool,
) -> None:
    folder, options = tmp_path / "memory", {"optimizer": optimizer, "placement": stores[placement]}
    bank = make_bank({**BY_ORDER, "init_std": std}, codec=codec, seed=7, **options)
    train(bank, some_steps())
    if loaded_whole:  # then all rows were written, and those that are zeros are found
        save_bank(bank, folder / "whole")
        bank = open_bank(folder / "whole", **options)
    train(bank, some_steps())
    save_bank(bank, folder, touched_only=True)
    touched = sum(int((records != 0).any(1).sum()) for records in every_record(bank))
    assert sum(table["touched"] for table in json.loads((folder / "memory.json").read_text())["tables"]) == touched
    assert 0 < touched < bank.rows / 4
    again = open_bank(folder, **options)
    assert same(every_record(again), every_record(bank))
    batches = some_steps()
    assert train(again, batches) == train(bank, batches)
    assert same(every_record(again), every_record(bank))
    save_bank(again, folder)  # whole, over what was not
    assert same(every_record(open_bank(folder, **options)), every_record(bank))


@pytest.mark.parametrize("codec", ["fp16", "fp8", "int8"])
def test_codecs_that_only_read(make_bank: Make, every_record: Records, tmp_path: Path, codec: str) -> None:
    bank = make_bank(BY_ORDER, codec=codec, seed=3)
    store: Any = bank.source(bank.tables[0]).store
    keys = make_keys(0, torch.tensor([2, 4, 9]))
    planes = {"value": torch.randn(3, 3), "count": torch.ones(3, 1, dtype=torch.int32)}
    store.write(keys, bank.source(bank.tables[0]).format.encode(keys, planes))
    save_bank(bank, tmp_path, touched_only=True)
    tokens = torch.randint(60, (2, 8))
    for options in ({}, {"cache": "1MB"}):
        again = open_bank(tmp_path, **options)
        assert again.codec == codec and same(every_record(again), every_record(bank))
        assert torch.equal(again.read(tokens).wait(1)["engram"], bank.read(tokens).wait(1)["engram"])
        save_bank(again, tmp_path / "again", touched_only=True)  # through a cache all rows are looked at
        assert same(every_record(open_bank(tmp_path / "again")), every_record(bank))


def test_a_table_of_a_hundred_million_rows_is_a_small_folder_and_is_not_read_through(
    make_bank: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(layers=(1,), max_ngram=2, heads=2, row_dim=2, rows_per_head=50_000_000)
    bank = make_bank(config, optimizer=RowwiseAdam)
    (table,) = bank.tables
    source, near = bank.source(table), torch.tensor([[0], [70_000_000], [bank.rows - 3_400]])  # pages are few so
    rows = (near + torch.arange(0, 3_400)).flatten()
    planes = {"value": torch.randn(len(rows), 2), "count": torch.ones(len(rows), 1, dtype=torch.int32)}
    keys = make_keys(0, rows)
    records = source.format.encode(keys, planes | {"moment": torch.rand(len(rows), 1)})
    store: Any = source.store
    store.write(keys, records)
    fetch, asked = DeviceStore.fetch, []
    monkeypatch.setattr(DeviceStore, "fetch", lambda store, keys: (asked.append(len(keys)), fetch(store, keys))[1])
    save_bank(bank, tmp_path, touched_only=True)
    assert bank.rows > 1e8 and size(tmp_path) < 30 * len(rows) and sum(asked) == 2 * len(rows)
    del bank, store
    again = open_bank(tmp_path, optimizer=RowwiseAdam)
    loaded: Any = again.source(table).store
    assert torch.equal(loaded.written(0), rows) and torch.equal(loaded.fetch(keys), records)
    save_bank(again, tmp_path / "again", touched_only=True)  # what was loaded is known, too
    assert sum(asked) == 2 * len(rows) + len(rows) + 2 * len(rows)


def test_rows_that_were_touched_since_become_untouched_again(
    make_bank: Make, train: Run, every_record: Records, tmp_path: Path
) -> None:
    bank = make_bank(BY_ORDER, optimizer=RowAdam)
    train(bank, some_steps(1))
    save_bank(bank, tmp_path, touched_only=True)
    expected = every_record(bank)
    train(bank, some_steps(3))
    assert not same(every_record(bank), expected)
    load_bank(bank, tmp_path)
    assert same(every_record(bank), expected)


def test_tables_read_from_it_are_whole_and_reads_in_place_are_refused(
    make_bank: Make, train: Run, tmp_path: Path
) -> None:
    bank = make_bank(BY_ORDER, optimizer=RowAdam, seed=5)
    train(bank, some_steps())
    for name in ("whole", "touched"):
        save_bank(bank, tmp_path / name, touched_only=name == "touched")
    for one, other in zip(saved_rows(tmp_path / "touched"), saved_rows(tmp_path / "whole"), strict=True):
        assert torch.equal(one.read(range(one.rows))[0], other.read(range(one.rows))[0])
    with pytest.raises(ValueError, match="holds touched rows alone, which are not read in place: load it with another"):
        open_bank(tmp_path / "touched", placement="disk")


def test_a_full_disk_leaves_the_earlier_rows(
    make_bank: Make, train: Run, every_record: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = make_bank(BY_ORDER, optimizer=RowAdam)
    train(bank, some_steps())
    save_bank(bank, tmp_path, touched_only=True)
    before, expected = {path.name for path in tmp_path.rglob("*")}, every_record(bank)
    train(bank, some_steps())
    real, calls = parts.TensorWriter.put, iter(range(100))

    def put(writer: parts.TensorWriter, name: str, first: int, rows: Tensor) -> None:
        if next(calls) == 7:
            raise OSError(28, "No space left on device")
        real(writer, name, first, rows)

    monkeypatch.setattr(parts.TensorWriter, "put", put)
    with pytest.raises(OSError, match="No space left"):
        save_bank(bank, tmp_path, touched_only=True)
    assert {path.name for path in tmp_path.rglob("*")} == before
    assert same(every_record(open_bank(tmp_path, optimizer=RowAdam)), expected)


def test_planes_are_not_lost_and_damage_is_named(make_bank: Make, train: Run, tmp_path: Path) -> None:
    bank = make_bank(BY_ORDER, optimizer=RowAdam)
    train(bank, some_steps())
    save_bank(bank, tmp_path, touched_only=True)
    with pytest.raises(ValueError, match="also holds mean, moment, which this bank would lose"):
        save_bank(open_bank(tmp_path), tmp_path, touched_only=True)
    (part,) = (tmp_path / "table-01").iterdir()
    whole = part.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"\x55", b"\x80\x02}."):
        part.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{part.name} is truncated or damaged"):
            open_bank(tmp_path, optimizer=RowAdam)
    part.unlink()
    with pytest.raises(ValueError, match=rf"{part.name} cannot be read"):
        open_bank(tmp_path, optimizer=RowAdam)
