"""A memory whose rows are divided over ranks is saved by all of them, in the format of one process, and whole or not
at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_sharded_bank import backward, batch, held, make
from torch import Tensor

from ranks import run_ranks
from torch_engram.memory import MemoryBank, load_bank, open_bank, save_bank
from torch_engram.optim import RowAdam
from torch_engram.stores import parts


def steps(bank: MemoryBank, first: int, count: int) -> None:
    rank = 0 if bank.shard is None else bank.shard.rank
    for number in range(first, first + count):
        step = bank.prefetch(*batch(number, rank))
        backward(step, 1.0, range(2))
        step.reduce()
        step.apply()


def small_parts() -> None:
    """Files of few rows, so that a table has more of them than there are ranks, and several chunks each."""
    parts.CHUNK_ROWS = 8
    for module in (parts, __import__("torch_engram.memory.saved_shards", fromlist=["x"])):
        module.ROWS_PER_PART, module.CHUNK_ROWS = 16, 8


def save_three_times(folder: Path) -> list[list[Tensor]]:
    small_parts()
    bank, found = make(group=dist.group.WORLD), []
    steps(bank, 0, 2)
    save_bank(bank, folder / "0")
    found.append(held(bank))
    before = _named(folder / "0")
    steps(bank, 4, 1)
    save_bank(bank, folder / "1", since=folder / "0")  # links, and what changed
    found.append(held(bank))
    if dist.get_rank() == 0:
        assert any("changes-" in name for name in _named(folder / "1") - before)
    steps(bank, 2, 3)
    save_bank(bank, folder / "1")
    found.append(held(bank))
    save_bank(bank, folder / "touched", touched_only=True)
    return found


def resume(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """What a bank of these ranks has of the memory's touched rows when it is opened, and of the whole memory when it is
    loaded into another placement."""
    opened = open_bank(folder.parent / "touched", optimizer=RowAdam, group=dist.group.WORLD)
    loaded = make(group=dist.group.WORLD, placement="host")
    load_bank(loaded, folder)
    steps(loaded, 7, 1)
    save_bank(loaded, folder)  # goes on from what was loaded
    return held(opened), held(loaded)


def _named(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}


def whole(ranks: list[list[Tensor]]) -> list[Tensor]:
    """Tables of what the ranks hold of each."""
    tables = []
    for shares in zip(*ranks, strict=True):
        table = torch.empty(sum(map(len, shares)), shares[0].shape[1], dtype=torch.uint8)
        for rank, share in enumerate(shares):
            table[rank :: len(shares)] = share
        tables.append(table)
    return tables


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_two_ranks_save_three_resume_and_one_reads(tmp_path: Path) -> None:
    saves = run_ranks(2, save_three_times, tmp_path)
    first, last = (whole([rank[number] for rank in saves]) for number in (0, 2))
    assert equal(held(open_bank(tmp_path / "0", optimizer=RowAdam)), first)
    for name in ("1", "touched"):
        assert equal(held(open_bank(tmp_path / name, optimizer=RowAdam)), last)
    assert not equal(first, last)
    opened, loaded = zip(*run_ranks(3, resume, tmp_path / "1"), strict=True)
    assert equal(whole(list(opened)), last)
    assert equal(held(open_bank(tmp_path / "1", optimizer=RowAdam)), whole(list(loaded)))


def fail_on_one(folder: Path) -> str:
    bank = make(group=dist.group.WORLD)
    save_bank(bank, folder)
    steps(bank, 0, 3)
    if dist.get_rank() == 1:
        real, calls = parts.TensorWriter.put, iter(range(100))

        def put(self: parts.TensorWriter, name: str, start: int, rows: Tensor) -> None:
            if next(calls) == 7:
                raise OSError(28, "No space left on device")
            real(self, name, start, rows)

        parts.TensorWriter.put = put  # type: ignore[method-assign]
    with pytest.raises(OSError) as raised:
        save_bank(bank, folder)
    with pytest.raises(ValueError, match=r"truncated|another|holds"):
        load_bank(make(group=dist.group.WORLD, seed=1), folder)
    dist.barrier()
    return str(raised.value)


def fail_to_read(folder: Path) -> tuple[str, int]:
    bank = make(group=dist.group.WORLD)
    steps(bank, 0, 1)
    if dist.get_rank() == 0:
        store, calls = bank.source(bank.tables[0]).store, iter(range(100))
        real = store.fetch

        def fetch(keys: Tensor, group: Tensor | None = None) -> Tensor:
            if next(calls) == 1:
                raise OSError(5, "Input/output error")
            return real(keys)

        store.fetch = fetch  # type: ignore[method-assign]
    with pytest.raises(OSError) as raised:
        save_bank(bank, folder)
    assert not list(folder.rglob("*.safetensors"))
    ahead = bank.prefetch(*batch(7, dist.get_rank()))
    touched = ahead.touched if dist.get_rank() == 0 else 1  # one rank may ask for itself
    ahead.discard()
    steps(bank, 1, 1)
    return str(raised.value), touched


def fail_twice(folder: Path) -> tuple[str, tuple[str, int]]:
    small_parts()
    unread = fail_to_read(folder / "unread")
    return fail_on_one(folder / "full"), unread


def test_what_one_rank_cannot_write_or_read_stops_all_and_leaves_the_earlier_memory(tmp_path: Path) -> None:
    told, unread = zip(*run_ranks(2, fail_twice, tmp_path), strict=True)
    assert "No space left" in told[1] and told[0].startswith("Rank 1 gave up") and "No space left" in told[0]
    assert equal(held(open_bank(tmp_path / "full", optimizer=RowAdam)), held(make()))
    (mine, touched), (theirs, _) = unread
    assert "Input/output error" in mine and theirs.startswith("Rank 0 gave up") and touched
