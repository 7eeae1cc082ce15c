"""Memories trained apart from one, merged by row: as a naive twin says, whole or not at all, and trained further."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.memory import MemoryBank, Tokens, merging, open_bank, save_bank
from torch_engram.memory.merging import Merging, merge_records
from torch_engram.optim import RowAdam, RowwiseAdam
from torch_engram.stores import Plane, RecordLayout, RowFormat

Make = Callable[..., MemoryBank]
Run = Callable[..., list[float]]
Records = Callable[[MemoryBank], list[Tensor]]
BY_ORDER = dict(row_dim=(3, 5), heads=(2, 3), rows_per_head=50)
FORMAT = RowFormat(RecordLayout((Plane("value", 2), Plane("count", 1, "int32"), Plane("moment", 1))), 3, init_std=0.5)


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


Row = dict[str, list[float]]


def naive(before: Row, after: list[Row], rule: str) -> Row | None:
    """One row, in plain numbers; None where nobody has updated it."""
    updates = [int(row["count"][0] - before["count"][0]) for row in after]
    who = [number for number, many in enumerate(updates) if many]
    if not who:
        return None
    most = max(who, key=lambda number: (updates[number], -number))
    if len(who) == 1:
        return after[most]
    value = []
    for column, start in enumerate(before["value"]):
        changes = [updates[number] * (after[number]["value"][column] - start) for number in who]
        if rule == "mean":
            value.append(start + sum(changes) / sum(updates))
        else:
            value.append(start + sum(change / updates[number] for change, number in zip(changes, who, strict=True)))
    return after[most] | {"value": value}


def rows_of(keys: Tensor, records: Tensor) -> list[Row]:
    planes = {name: plane.tolist() for name, plane in FORMAT.decode(keys, records).items()}
    return [{name: plane[row] for name, plane in planes.items()} for row in range(len(keys))]


@given(st.integers(1, 5), st.integers(1, 20), st.sampled_from(merging.RULES), st.integers(0, 99))
def test_rows_are_merged_as_the_naive_twin_says(memories: int, rows: int, rule: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def some(most: int) -> Tensor:
        return torch.randint(most, (rows, 1), generator=generator, dtype=torch.int32)

    keys, count = torch.arange(rows), some(3)
    planes = {"value": random(rows, 2) * (count > 0), "count": count, "moment": random(rows, 1)}
    own, theirs = FORMAT.encode(keys, planes), []
    for _ in range(memories):
        more = some(4) * (random(rows, 1) > 0)
        other = {"value": random(rows, 2), "count": count + more, "moment": random(rows, 1)}
        theirs.append(torch.where(more > 0, FORMAT.encode(keys, other), own))
    updated, records = merge_records(FORMAT, keys, own, theirs, rule)
    before, after = rows_of(keys, own), [rows_of(keys, each) for each in theirs]
    for row, merged in enumerate(rows_of(keys, records)):
        expected = naive(before[row], [each[row] for each in after], rule)
        assert bool(updated[row]) == (expected is not None)
        if expected is not None:
            assert merged["value"] == pytest.approx(expected["value"], rel=1e-5, abs=1e-6)
            assert merged | {"value": []} == expected | {"value": []}


@pytest.fixture
def family(make_bank: Make, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[MemoryBank]:
    """A parent and three children of it, saved as 0 to 3: whole, touched rows alone, and whole with changes."""
    monkeypatch.setattr(merging, "CHUNK_ROWS", 64)
    config = {**BY_ORDER, "init_std": 0.5}
    banks = [make_bank(config, optimizer=RowAdam, seed=3, codec="bf16")]
    train(banks[0], [[Tokens(torch.randint(60, (1, 4)))] for _ in range(2)])
    save_bank(banks[0], tmp_path / "0", touched_only=True)
    for number in (1, 2, 3):
        banks.append(open_bank(tmp_path / "0", optimizer=RowAdam))
        if number == 3:
            save_bank(banks[3], tmp_path / "3")
        train(banks[number], [[Tokens(torch.randint(20 * number, (1, 4)))] for _ in range(number)])
        save_bank(banks[number], tmp_path / str(number), touched_only=number == 1)
    return banks


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_banks_are_merged_row_by_row_and_trained_further(
    family: list[MemoryBank],
    train: Run,
    every_record: Records,
    stores: dict[str, Any],
    tmp_path: Path,
    placement: str,
) -> None:
    folders = [tmp_path / str(number) for number in (1, 2, 3)]
    bank = open_bank(folders[0].parent / "0", optimizer=RowAdam, placement=stores[placement], cache="1MB")
    before = every_record(bank)
    Merging(bank, folders).apply()
    alone = several = 0
    for table, old, new, *theirs in zip(bank.tables, before, *map(every_record, [bank, *family[1:]]), strict=True):
        keys = torch.arange(table.rows) | table.space << 40
        updated, expected = merge_records(bank.source(table).format, keys, old, theirs, "mean")
        assert torch.equal(new, torch.where(updated[:, None], expected, old))
        changed = torch.stack([(each != old).any(1) for each in theirs])
        alone, several = alone + int((changed.sum(0) == 1).sum()), several + int((changed.sum(0) > 1).sum())
        for who, each in zip(changed, theirs, strict=True):
            own = who & (changed.sum(0) == 1)
            assert torch.equal(new[own], each[own])
    assert alone and several
    save_bank(bank, tmp_path / "merged", touched_only=True)
    again = open_bank(tmp_path / "merged", optimizer=RowAdam)
    assert same(every_record(again), every_record(bank))
    batches = [[Tokens(torch.randint(60, (1, 4)))] for _ in range(2)]
    assert train(again, batches) == train(bank, batches)
    child = tmp_path / "4"
    save_bank(again, child)
    parent = open_bank(tmp_path / "merged", optimizer=RowAdam)
    Merging(parent, [child]).apply()  # and may be a parent itself
    assert same(every_record(parent), every_record(again))


def test_one_memory_alone_and_none_that_was_trained(
    family: list[MemoryBank], every_record: Records, tmp_path: Path
) -> None:
    bank = open_bank(tmp_path / "0", optimizer=RowAdam)
    Merging(bank, [tmp_path / "0"]).apply()
    assert same(every_record(bank), every_record(family[0]))
    Merging(bank, [tmp_path / "2", tmp_path / "0"]).apply()
    assert same(every_record(bank), every_record(family[2]))
    reader = open_bank(tmp_path / "0")  # values and counts alone
    Merging(reader, [tmp_path / "1", tmp_path / "2"], "sum").apply()
    trained = open_bank(tmp_path / "0", optimizer=RowAdam)
    Merging(trained, [tmp_path / "1", tmp_path / "2"], "sum").apply()
    tokens = torch.randint(60, (2, 8))
    assert torch.equal(reader.read(tokens).wait(1)["engram"], trained.read(tokens).wait(1)["engram"])


def test_what_does_not_fit_is_refused_before_any_row_has_changed(
    family: list[MemoryBank], make_bank: Make, train: Run, every_record: Records, tmp_path: Path
) -> None:
    bank = open_bank(tmp_path / "0", optimizer=RowAdam)
    before = every_record(bank)

    def refused(sentence: str, *folders: Any, into: MemoryBank = bank, rule: str = "mean") -> None:
        with pytest.raises(ValueError, match=sentence) as caught:
            Merging(into, [tmp_path / str(folder) for folder in folders], rule).apply()
        assert "\n" not in str(caught.value) and same(every_record(bank), before)

    refused("There is no rule 'means': did you mean 'mean'", 1, rule="means")
    refused("is not a saved memory", 1, "nothing")
    refused(
        r"1 was not trained from memory 'engram' as it is \(see row \d+ of layer 1\): load the memory that",
        1,
        into=open_bank(tmp_path / "2", optimizer=RowAdam),
    )
    other = make_bank({**BY_ORDER, "init_std": 0.5}, optimizer=RowAdam, seed=3, codec="bf16")
    train(other, [[Tokens(torch.randint(60, (1, 4)))] for _ in range(9)])  # more often than the parent
    save_bank(other, tmp_path / "other")
    refused("other was not trained from memory 'engram' as it is", 1, "other")
    for name, changes, options, sentence in (
        ("wide", {"init_std": 0.1}, {}, "wide holds a memory with another configuration than 'engram'"),
        ("seed", {}, {"seed": 4}, "seed holds a memory with another seed of initial rows than 'engram'"),
        ("rule", {}, {"optimizer": RowwiseAdam}, "has other planes than this table: load it with its own"),
    ):
        made = make_bank(
            {**BY_ORDER, "init_std": 0.5, **changes}, **{"optimizer": RowAdam, "seed": 3, "codec": "bf16", **options}
        )
        save_bank(made, tmp_path / name)
        refused(sentence, 1, name)
    ahead = bank.prefetch(torch.randint(60, (1, 4)))
    refused("Steps were prefetched from this bank", 1)
    ahead.discard()
    lazy = make_bank(BY_ORDER, optimizer=lambda rows: RowAdam(rows, lazy_decay=True))
    refused("owe decay that only their own run's steps tell", 1, into=lazy)
    save_bank(family[0], tmp_path / "whole")
    refused("is read-only: rows cannot be loaded into it", 1, into=open_bank(tmp_path / "whole", placement="disk"))
    (part,) = (tmp_path / "1" / "table-03").iterdir()
    part.write_bytes(part.read_bytes()[:-1])
    refused(rf"{part.name} is truncated or damaged", 2, 1)
