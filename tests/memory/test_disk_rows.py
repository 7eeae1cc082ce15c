"""Rows that are trained on disk, with a cache of blocks far smaller than the table: the trajectory of a table in
memory, saved and opened anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_engram import MemoryBank, RowAdam, RowwiseAdam, Tokens, disk_rows, load_bank, open_bank, save_bank
from torch_engram.stores import DiskTable
from torch_engram.stores.block_reads import BLOCK

Make = Callable[..., MemoryBank]
Run = Callable[..., list[float]]
Records = Callable[[MemoryBank], list[Tensor]]
LARGE = dict(row_dim=(23, 41), rows_per_head=1297)
"""Two stores, of records that share blocks and go on in the next, in 300 blocks and 500."""


def batches(steps: int = 25) -> list[list[Tokens]]:
    """Rows that come back after 1, 2, 3, … steps among others that are all over the table."""
    generator, found = torch.Generator().manual_seed(7), []
    for number in range(steps):
        few = torch.randint(2, 5 + number % 5, (1, 6), generator=generator)
        any_row = torch.randint(2, 60, (1, 9), generator=generator)
        found.append([Tokens(few), Tokens(any_row)] if number % 3 else [Tokens(any_row)])
    return found


@pytest.fixture(scope="module")
def expected(make_bank: Make, train: Run, every_record: Records) -> tuple[list[float], list[Tensor]]:
    bank = make_bank(LARGE, optimizer=lambda p: RowAdam(p, lr=0.05), codec="bf16")
    return train(bank, batches()), every_record(bank)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_one_trajectory_bit_for_bit_though_blocks_come_and_go(
    make_bank: Make,
    train: Run,
    every_record: Records,
    expected: tuple[list[float], list[Tensor]],
    tmp_path: Path,
    depth: int,
) -> None:
    options: dict[str, Any] = dict(cache="1MB") if depth == 2 else {}
    bank = make_bank(
        LARGE, optimizer=lambda p: RowAdam(p, lr=0.05), codec="bf16", placement=disk_rows(tmp_path, 0), **options
    )
    stores = {getattr(store, "store", store) for store in (bank.source(table).store for table in bank.tables)}
    assert len(stores) == 2
    for store in stores:
        assert isinstance(store, DiskTable)
        assert sum(store.spaces.values()) * store.layout.nbytes > 2 * len(store._table.cache.memory)
    losses, records = train(bank, batches(), depth), every_record(bank)
    assert losses == expected[0]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(records, expected[1], strict=True))


def test_is_saved_and_opened_like_any_other(make_bank: Make, train: Run, every_record: Records, tmp_path: Path) -> None:
    """Later saves add the rows that changed; a run goes on from there on disk or in memory."""
    data = batches(12)
    bank = make_bank(LARGE, optimizer=RowwiseAdam, placement=disk_rows(tmp_path / "rows", "300kB"))
    train(bank, data[:4])
    save_bank(bank, tmp_path / "saved")
    train(bank, data[4:8])
    save_bank(bank, tmp_path / "saved")
    assert list((tmp_path / "saved").rglob("changes-*.safetensors"))
    opened = [
        open_bank(tmp_path / "saved", optimizer=RowwiseAdam, placement=placement)
        for placement in ("device", disk_rows(tmp_path / "other", 0))
    ]
    for one in opened:
        assert train(one, data[8:]) == train(bank, data[8:]) or one is not opened[0]
        assert one is not opened[0] or all(map(torch.equal, every_record(one), every_record(bank)))
        load_bank(bank, tmp_path / "saved")
    assert all(map(torch.equal, *map(every_record, opened)))
    save_bank(opened[1], tmp_path / "again")
    assert all(
        map(torch.equal, every_record(open_bank(tmp_path / "again", optimizer=RowwiseAdam)), every_record(opened[0]))
    )


def test_banks_do_not_share_a_folder(make_bank: Make, tmp_path: Path) -> None:
    first = make_bank(optimizer=RowAdam, placement=disk_rows(tmp_path / "rows"))
    with pytest.raises(ValueError, match=r"Another process or bank trains rows in .*rows: wait for its end, or give"):
        make_bank(optimizer=RowAdam, placement=disk_rows(tmp_path / "rows"))
    make_bank(optimizer=RowAdam, placement=disk_rows(tmp_path / "other"))
    del first
    make_bank(optimizer=RowAdam, placement=disk_rows(tmp_path / "rows"))


def test_what_is_no_budget_or_no_folder_is_refused(make_bank: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'much' is no size"):
        disk_rows(tmp_path, "much")
    with pytest.raises(ValueError, match=r"to train rows on disk, give placement=disk_rows\(folder\)"):
        make_bank(optimizer=RowAdam, placement="disk")
    bank = make_bank(optimizer=RowAdam)
    save_bank(bank, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"with another placement, such as disk_rows\(folder\)"):
        open_bank(tmp_path / "saved", optimizer=RowAdam, placement="disk")


def test_a_memory_on_disk_is_only_as_large_as_what_was_written(make_bank: Make, train: Run, tmp_path: Path) -> None:
    bank = make_bank({"rows_per_head": 5_000_000}, optimizer=RowAdam, placement=disk_rows(tmp_path / "rows", "1MB"))
    train(bank, batches(3))
    bank.flush()
    (file,) = (tmp_path / "rows").iterdir()
    assert file.stat().st_size > 1 << 30 and file.stat().st_blocks * 512 < 1000 * BLOCK
