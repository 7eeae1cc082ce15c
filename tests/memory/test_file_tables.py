"""What a bank of tables in files finds by their names, and what it refuses, with the mend."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torch_engram.memory import MemoryBank, file_tables, open_bank, save_bank
from torch_engram.optim import RowAdam
from torch_engram.stores import DiskStore, WritableStore
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.tensor_files import encode_header, tensors_in

Make = Callable[..., MemoryBank]


@pytest.fixture
def rows(make_bank: Make) -> dict[int, Tensor]:
    """Random rows for every layer of the small configuration."""
    return {table.layer: torch.randn(table.rows, table.dim) for table in make_bank().tables}


def embeddings(bank: MemoryBank) -> list[Tensor]:
    tokens = torch.arange(30).view(2, 15)
    return [bank.read(tokens).wait(layer)["engram"] for layer in bank.config.layers]


def test_tensors_of_any_name_by_a_mapping(make_bank: Make, rows: dict[int, Tensor], tmp_path: Path) -> None:
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"memory/first": rows[1], "head.weight": torch.ones(3, 4)}, file)
    save_file({"second": rows[3]}, other)
    (second,) = find_tables(tensors_in(other))
    bank = make_bank(tables={1: (str(file), "memory/first"), 3: second}, placement="disk")
    store: Any = bank.source(bank.tables[0]).store
    assert isinstance(store, DiskStore) and not isinstance(store, WritableStore)
    for table in bank.tables:
        found = bank.source(table).store.fetch(torch.arange(table.rows) + (table.space << 40))
        assert torch.equal(found.view(torch.float32), rows[table.layer])
    with pytest.raises(ValueError, match="no table 'memory/frst' in these files: did you mean 'memory/first'"):
        make_bank(tables={1: (file, "memory/frst"), 3: second})
    with pytest.raises(ValueError, match=r"The mapping has tables of 3, and none of layer 1: give tables=\{1: \("):
        make_bank(tables={3: second})


def test_layers_that_names_do_not_say_are_asked_for(make_bank: Make, rows: dict[int, Tensor], tmp_path: Path) -> None:
    save_file({"first": rows[1], "second": rows[3]}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="has tables of no layer, and none of layer 1: give tables="):
        make_bank(tables=tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    one = make_bank({"layers": (1,)})
    save_file({"any": torch.randn(one.rows, 4)}, alone / "a.safetensors")
    assert make_bank({"layers": (1,)}, tables=alone).rows == one.rows


def test_tables_of_another_size_are_refused_with_both_sizes(make_bank: Make, tmp_path: Path) -> None:
    name = "layers.1.engram.embed.{}"
    config = {"layers": (1,), "row_dim": 32}
    rows = make_bank(config).rows

    def write(rows: int, width: int) -> None:
        codes, scales = torch.zeros(rows, width).to(torch.float8_e4m3fn), torch.zeros(rows, width // 32)
        tensors = {name.format("weight"): codes, name.format("scale"): scales.to(torch.float8_e8m0fnu)}
        save_file(tensors, tmp_path / "a.safetensors")

    for other, width in ((rows + 3, 32), (rows, 64)):
        write(other, width)
        wanted = (
            f"has {other:,} rows of {width} numbers, and layer 1 of this configuration {rows:,} of 32: .* row_multiple"
        )
        with pytest.raises(ValueError, match=wanted):
            make_bank(config, tables=tmp_path, placement="disk")
    padded = make_bank({**config, "row_multiple": 16}).rows
    assert padded > rows
    write(padded, 32)
    assert make_bank({**config, "row_multiple": 16}, tables=tmp_path, placement="disk").rows == padded
    with pytest.raises(ValueError, match=r"Layer 1 has rows of several widths, .* give one row_dim"):
        make_bank(
            {"layers": (1,), "row_dim": (32, 16), "row_multiple": 16}, tables={1: find_tables(tensors_in(tmp_path))[0]}
        )


def test_what_cannot_be_done_with_files_is_refused(make_bank: Make, rows: dict[int, Tensor], tmp_path: Path) -> None:
    save_file({"first": rows[1].half(), "second": rows[3].bfloat16()}, tmp_path / "a.safetensors")
    mixed = {1: (tmp_path, "first"), 3: (tmp_path, "second")}
    with pytest.raises(ValueError, match=r"in bf16 and fp16: load all in one, such as codec='bf16'"):
        make_bank(tables=mixed)
    with pytest.raises(ValueError, match=r"read in place stay so: leave out codec='fp16', or use placement"):
        make_bank(tables=mixed, codec="fp16", placement="disk")
    make_bank(tables=mixed, codec="fp16", placement="host")
    with pytest.raises(ValueError, match="only read, and never written to: leave out the optimizer"):
        make_bank(tables=mixed, optimizer=RowAdam)
    with pytest.raises(ValueError, match="no placement 'dsk' for tables in files: did you mean 'disk'"):
        make_bank(tables=mixed, placement="dsk")
    with pytest.raises(ValueError, match=r"placement='disk' reads tables in files: give tables=, or use open_bank"):
        make_bank(placement="disk")
    with pytest.raises(ValueError, match="no codec 'bf17' for values: did you mean 'bf16'"):
        make_bank(tables=mixed, codec="bf17")
    with pytest.raises(ValueError, match=r"Memory 'engram' only reads its tables, .* copy their files"):
        save_bank(make_bank(tables=mixed, codec="fp16"), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_tables_that_do_not_fit_into_memory_are_refused_with_their_size(make_bank: Make, tmp_path: Path) -> None:
    config = {"layers": (1,), "row_multiple": 2**40}
    header = encode_header({"table.weight": (torch.bfloat16, (2**40, 4))})
    with open(tmp_path / "a.safetensors", "wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + 2**43)  # holes, which read as zeros
    assert not any(found.any() for found in embeddings(make_bank(config, tables=tmp_path, placement="disk")))
    with pytest.raises(ValueError, match=r"The tables take 8,192.0 GiB, which cpu does not have: read them in place"):
        make_bank(config, tables=tmp_path, placement="host")


def test_a_saved_memory_is_opened_as_one(make_bank: Make, tmp_path: Path) -> None:
    save_bank(make_bank(), tmp_path)
    with pytest.raises(ValueError, match=r"is a saved memory: open it with open_bank\(\)"):
        make_bank(tables=tmp_path)
    with pytest.raises(ValueError, match="only read, and never written to: leave out the optimizer"):
        open_bank(tmp_path, placement="disk", optimizer=RowAdam)
    part = next((tmp_path / "table-00").iterdir())
    os.truncate(part, part.stat().st_size - 4)
    with pytest.raises(ValueError, match=f"{part.name} is no whole safetensors file"):
        open_bank(tmp_path, placement="disk")


def test_a_fault_of_the_disk_is_raised_where_the_rows_are_waited_for(
    make_bank: Make, rows: dict[int, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"first": rows[1], "second": rows[3]}, file)
    bank = make_bank(tables={1: (file, "first"), 3: (file, "second")}, placement="disk")
    embeddings(bank)
    os.truncate(file, 100)
    with pytest.raises(OSError, match=r"a\.safetensors was changed while it was in use"):
        embeddings(bank)


@pytest.mark.parametrize("tables", ["", 5, ["t"], {1: "x"}, {1: None}, {1: ("a", "b", "c")}])
def test_what_are_no_tables_is_refused(make_bank: Make, tables: Any) -> None:
    with pytest.raises(ValueError, match=r"tables= is a file, a folder|A layer's table is a NamedTable or a pair"):
        make_bank(tables=tables, placement="disk")


@pytest.mark.parametrize("placement", [5, None, ["disk"]])
def test_what_is_no_placement_is_refused(make_bank: Make, placement: Any) -> None:
    with pytest.raises(ValueError, match="There is no placement"):
        make_bank(placement=placement)


@pytest.mark.parametrize("row", [-1, 2**40, 2**62])
def test_a_row_that_somebody_else_hashed_wrongly_is_named(make_bank: Make, row: int) -> None:
    bank = make_bank()
    rows = torch.zeros(1, 2, bank.config.columns, dtype=torch.int64)
    rows[0, 1, 1] = row
    with pytest.raises(ValueError, match=f"Row {row:,} is not in layer 1, which has"):
        bank.read_rows(1, rows).wait(1)


def test_a_bank_is_refused_in_a_forked_process(make_bank: Make, rows: dict[int, Tensor], tmp_path: Path) -> None:
    save_file({"a": rows[1], "b": rows[3]}, tmp_path / "a.safetensors")
    pairs = {1: (tmp_path / "a.safetensors", "a"), 3: (tmp_path / "a.safetensors", "b")}
    bank = make_bank(tables=pairs, placement="disk")
    embeddings(bank)
    store = bank.source(bank.tables[0]).store
    reads = (lambda: embeddings(bank), lambda: store.fetch(torch.arange(3)))
    child = os.fork()
    if not child:
        refused = 0
        for read in reads:
            try:
                read()
            except ValueError as error:
                refused += "open it in each process" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(reads)


def test_processes_of_one_launch_share_a_table_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert file_tables._is_alone()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert not file_tables._is_alone()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(file_tables.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(file_tables.distributed, "get_world_size", lambda: 2)
    assert not file_tables._is_alone()
