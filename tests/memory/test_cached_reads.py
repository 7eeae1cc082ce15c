"""Reads through a cache by n-gram, many under way at once: right rows whatever overlaps, is dropped or fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torch_engram.memory import MemoryBank, Tokens, WorkingSet
from torch_engram.stores import HostStore, NgramCache, RecordLayout

Make = Callable[..., MemoryBank]


@pytest.fixture
def tables(make_bank: Make, tmp_path: Path) -> Path:
    """Random rows for every layer of the small configuration."""
    rows = {f"layers.{table.layer}.table": torch.randn(table.rows, 4) for table in make_bank().tables}
    save_file(rows, tmp_path / "tables.safetensors")
    return tmp_path


def embeddings(step: WorkingSet, bank: MemoryBank) -> list[Tensor]:
    return [step[micro].wait(layer)["engram"].cpu() for micro in range(len(step)) for layer in bank.config.layers]


def batches(many: int) -> list[list[Tokens]]:
    """Micro-batches of several shapes, some of whose positions are dead."""
    found = []
    for number in range(many):
        shapes = [(1, 7), (2, 5)] if number % 3 else [(3, 4)]
        found.append([Tokens(torch.randint(60, shape), live=torch.rand(shape) < 0.8) for shape in shapes])
    return found


@pytest.mark.parametrize("cache", [20_000, "1MB"])
def test_reads_ahead_and_dropped_ones_leave_right_rows(
    make_bank: Make, tables: Path, device: torch.device, cache: int | str
) -> None:
    plain = make_bank(tables=tables, placement="host")
    bank = make_bank(tables=tables, placement="host", cache=cache, device=device)
    asked = batches(24)
    steps = [bank.prefetch(*batch) for batch in asked[:12]]
    for number, batch in enumerate(asked):
        step = steps[number]
        if number % 4 == 3:
            step.discard()
        else:
            for got, want in zip(embeddings(step, bank), embeddings(plain.prefetch(*batch), plain), strict=True):
                assert torch.equal(got, want)
        if len(steps) < len(asked):
            steps.append(bank.prefetch(*asked[len(steps)]))
    bank.settle()
    counts = bank.cache_counts()
    assert all(line["hits"] and line["misses"] for line in counts.values())


class FailingStore(HostStore):
    """Fails at some of its fetches."""

    fails = 0

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        if self.fails:
            self.fails -= 1
            raise OSError("the disk is gone")
        return super().fetch(keys, group)


def failing(layout: RecordLayout, spaces: Mapping[int, int], device: torch.device) -> FailingStore:
    return FailingStore(layout, spaces, for_gpu=False)


def test_a_fetch_that_fails_is_told_and_the_next_ones_are_right(make_bank: Make) -> None:
    bank, plain = (make_bank(placement=failing, cache=cache) for cache in ("1MB", None))
    store = bank.source(bank.tables[0]).store.store  # type: ignore[attr-defined]
    tokens = [torch.randint(60, (2, 9)) for _ in range(6)]
    store.fails = 3
    steps = [bank.prefetch(batch) for batch in tokens]
    told = 0
    for step, batch in zip(steps, tokens, strict=True):
        for layer in bank.config.layers:
            try:
                got = step[0].wait(layer)["engram"]
            except OSError as error:
                assert str(error) == "the disk is gone"
                told += 1
            else:
                assert torch.equal(got, plain.read(batch).wait(layer)["engram"])
    assert told >= 6 and not store.fails  # all layers of a read, and of reads that had begun by then
    for batch in tokens:
        for layer in bank.config.layers:
            assert torch.equal(bank.read(batch).wait(layer)["engram"], plain.read(batch).wait(layer)["engram"])


@pytest.mark.parametrize("cache", [20_000, "1MB"])
def test_a_shape_that_comes_again_and_again(
    make_bank: Make, tables: Path, device: torch.device, cache: int | str
) -> None:
    """On a GPU such prefetches are recorded and replayed: ids from anywhere, with and without document starts."""
    plain = make_bank(tables=tables, placement="host")
    bank = make_bank(tables=tables, placement="host", cache=cache, device=device)
    asked = []
    for number in range(20):
        shape = (2, 7) if number % 5 else (1, 7)
        ids = torch.randint(60, shape)
        asked.append(Tokens(ids, doc_start=torch.rand(shape) < 0.2 if number % 3 else None))
    here = [Tokens(tokens.ids.to(device), tokens.doc_start) if number % 2 else tokens
            for number, tokens in enumerate(asked)]  # fmt: skip
    steps = [bank.prefetch(tokens) for tokens in here[:4]]
    for number, tokens in enumerate(asked):
        step = steps[number]
        if number == 9:
            step.discard()
        else:
            for got, want in zip(embeddings(step, bank), embeddings(plain.prefetch(tokens), plain), strict=True):
                assert torch.equal(got, want)
            assert step.touched == plain.prefetch(tokens).touched
        if len(steps) < len(asked):
            steps.append(bank.prefetch(here[len(steps)]))
    for _ in range(2):
        with pytest.raises(ValueError, match="Token id 60 is outside this memory's vocabulary of 60 ids"):
            bank.prefetch(torch.full((2, 7), 60))[0].wait(1)
        step = bank.prefetch(asked[1])
        for got, want in zip(embeddings(step, bank), embeddings(plain.prefetch(asked[1]), plain), strict=True):
            assert torch.equal(got, want)
    with pytest.raises(ValueError, match="doc_start has the shape"):
        bank.prefetch(Tokens(torch.ones(2, 7, dtype=torch.int64), doc_start=torch.ones(2, 6) == 1))[0].wait(1)


def test_a_read_for_which_there_is_no_memory_claims_nothing(make_bank: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, plain = (make_bank(placement=failing, cache=cache) for cache in ("1MB", None))
    tokens, cache = torch.randint(60, (2, 9)), bank.source(bank.tables[0]).store
    assert isinstance(cache, NgramCache)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "new_ask", lambda capacity: (_ for _ in ()).throw(MemoryError("none left")))
        with pytest.raises(MemoryError, match="none left"):
            bank.read(tokens).wait(1)
    for layer in bank.config.layers:
        assert torch.equal(bank.read(tokens).wait(layer)["engram"], plain.read(tokens).wait(layer)["engram"])


def test_embeddings_for_which_there_is_no_memory_keep_nobody_waiting(
    make_bank: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, plain = (make_bank(placement=failing, cache=cache) for cache in ("1MB", None))
    tokens, real = torch.randint(60, (2, 9)), torch.empty

    def empty(*shape: int, **options: object) -> Tensor:
        if len(shape) == 3 and shape[0] == len(bank.config.layers):
            raise MemoryError("none left")
        return real(*shape, **options)  # type: ignore[call-overload, no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        with pytest.raises(MemoryError, match="none left"):
            bank.read(tokens).wait(1)
        bank.settle()
    for layer in bank.config.layers:
        assert torch.equal(bank.read(tokens).wait(layer)["engram"], plain.read(tokens).wait(layer)["engram"])
