"""A saved memory's values read in place: what a bank reads of them, whatever was saved whole and what was added."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from torch_engram.memory import MemoryBank, Tokens, save_bank
from torch_engram.memory.saved_rows import saved_rows
from torch_engram.optim import RowAdam
from torch_engram.stores import make_keys, parts
from torch_engram.stores.convert import Conversion
from torch_engram.stores.open_files import ChangedFile
from torch_engram.stores.row_sources import named_rows
from torch_engram.stores.shards import Target

Make = Callable[..., MemoryBank]
Run = Callable[..., list[float]]


def values(bank: MemoryBank) -> list[torch.Tensor]:
    """Every row of each table as the network reads it."""
    bank.flush()
    found = []
    for table in bank.tables:
        keys, source = make_keys(table.space, torch.arange(table.rows)), bank.source(table)
        found.append(source.format.decode(keys, source.store.fetch(keys))["value"])
    return found


@pytest.fixture
def trained(make_bank: Make, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryBank:
    """Saved in several parts, then with changes over changes."""
    monkeypatch.setattr(parts, "ROWS_PER_PART", 40)
    bank = make_bank({"row_dim": (3, 5), "rows_per_head": 300}, optimizer=RowAdam, codec="bf16", seed=3)
    for _ in range(3):
        train(bank, [[Tokens(torch.randint(60, (1, 3)))]])
        save_bank(bank, tmp_path / "memory")
    assert list((tmp_path / "memory").rglob("changes-*")) and not all(value.isnan().any() for value in values(bank))
    return bank


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_rows_are_the_banks_those_that_were_never_written_too(trained: MemoryBank, tmp_path: Path, step: int) -> None:
    tables = saved_rows(tmp_path / "memory")
    assert [table.name for table in tables] == [f"layers.{n}.{k}.table.weight" for n in (1, 3) for k in (0, 1)]
    for table, expected in zip(tables, values(trained), strict=True):
        runs = [table.read(range(first, min(first + step, table.rows))) for first in range(0, table.rows, step)]
        assert all(len(parts) == 1 for parts in runs)
        assert torch.equal(torch.cat([parts[0] for parts in runs]).float(), expected)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp8", "int8"])
def test_a_memory_becomes_tables_of_its_layers(make_bank: Make, tmp_path: Path, codec: str) -> None:
    bank = make_bank({"rows_per_head": 50}, codec=codec, seed=5)
    save_bank(bank, tmp_path / "memory")
    conversion = Conversion(tmp_path / "memory", saved_rows(tmp_path / "memory"), tmp_path / "out", Target())
    conversion.run()
    tables = named_rows(tmp_path / "out")
    assert [(table.name, table.layer, table.codec) for table in tables] == [
        (f"layers.{layer}.table.weight", layer, codec) for layer in (1, 3)
    ]
    for table, own in zip(tables, bank.tables, strict=True):
        made = bank.source(own).format.initial(make_keys(own.space, torch.arange(own.rows)))
        for part, expected in zip(table.read(range(table.rows)), made, strict=True):
            assert torch.equal(part.view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_several_widths_a_layer_need_names_that_say_more_than_the_layer(trained: MemoryBank, tmp_path: Path) -> None:
    tables = saved_rows(tmp_path / "memory")
    with pytest.raises(ValueError, match=r"layers\.1\.0\.table\.weight and .* would both be"):
        Conversion(tmp_path / "memory", tables, tmp_path / "out", Target("deepseek-v4.1"))
    Conversion(tmp_path / "memory", tables, tmp_path / "out", Target(codec="fp32", shards=4)).run()
    for table, expected in zip(named_rows(tmp_path / "out"), values(trained), strict=True):
        assert torch.equal(table.read(range(table.rows))[0], expected)


@pytest.mark.usefixtures("trained")
def test_a_memory_that_is_damaged_or_saved_over_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    tables = saved_rows(folder)
    (folder / "memory.json").touch()
    with pytest.raises(ChangedFile, match=r"memory\.json was changed"):
        tables[0].require_in_place()
    changes = next(folder.rglob("changes-*"))
    content: dict[str, Any] = load_file(changes)
    save_file(content | {"row": content["row"].flip(0).contiguous()}, changes)
    with pytest.raises(ValueError, match=r"changes-.* lists rows out of order: use an intact copy"):
        for table in saved_rows(folder):
            table.read(range(table.rows))
    del content["count"]
    save_file(content, changes)
    with pytest.raises(
        ValueError, match=r"changes-.* is not the part that is listed \('count' differs\): use an intact copy"
    ):
        saved_rows(folder)
    changes.unlink()
    with pytest.raises(ValueError, match=r"changes-.* is no file: use an intact copy"):
        saved_rows(folder)
