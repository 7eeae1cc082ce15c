"""How a bank splits its columns into tables, what it hands its stores, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_engram.memory import MemoryBank, Tokens
from torch_engram.optim import RowAdam
from torch_engram.stores import make_keys, slots

Make = Callable[..., MemoryBank]


def test_tables_split_where_the_width_changes(make_bank: Make) -> None:
    bank = make_bank(
        {
            "max_ngram": 5,
            "heads": (1, 2, 3, 1),
            "row_dim": (4, 4, 2, 4),
            "rows_per_head": (5, 9, 7, 30),
            "row_multiple": 16,
        }
    )
    assert [(t.layer, t.space, t.columns, t.dim) for t in bank.tables] == [
        (1, 0, slice(0, 3), 4), (1, 1, slice(3, 6), 2), (1, 2, slice(6, 7), 4),
        (3, 3, slice(0, 3), 4), (3, 4, slice(3, 6), 2), (3, 5, slice(6, 7), 4),
    ]  # fmt: skip
    assert bank.tables[0].orders == (0, 1, 1) and bank.tables[1].orders == (2, 2, 2)
    for layer in (1, 3):
        layout, tables = bank.addressing.layouts[layer], [t for t in bank.tables if t.layer == layer]
        assert sum(t.rows for t in tables) == layout.rows
        assert [t.first_row for t in tables] == [layout.offsets[t.columns.start] for t in tables]
    assert bank.rows == sum(layout.rows for layout in bank.addressing.layouts.values())
    assert bank.table_parameters == sum(t.rows * t.dim for t in bank.tables)


def test_a_grouped_store_is_given_the_mix_of_each_columns_order(make_bank: Make, stores: dict[str, Any]) -> None:
    bank = make_bank({"heads": (2, 3), "rows_per_head": 1000}, placement=stores["read-only"])
    tokens = torch.randint(60, (2, 6))
    bank.read(tokens).wait(1)
    mix, rows = bank.addressing.rows(bank.addressing.windows(tokens), 1)
    reads: dict[int, set[int]] = {}
    for c, order in enumerate(bank.tables[0].orders):
        for row, value in zip(rows[..., c].flatten().tolist(), mix[..., order].flatten().tolist(), strict=True):
            reads.setdefault(row, set()).add(value)
    store: Any = bank.source(bank.tables[0]).store
    keys, group = store.asked[0]
    assert keys.tolist() == sorted(make_keys(0, torch.tensor(list(reads))).tolist())
    assert all(value in reads[key] for key, value in zip(keys.tolist(), group.tolist(), strict=True))


def test_a_read_only_store_is_refused_where_it_is_passed(make_bank: Make, stores: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ReadOnlyStore is read-only: leave out the optimizer"):
        make_bank(placement=stores["read-only"], optimizer=RowAdam)
    assert make_bank(placement=stores["read-only"]).read(torch.tensor([[1]])).wait(3)["engram"].shape == (1, 1, 16)


@pytest.mark.parametrize(
    "codec, error", [("fp32", 0), ("bf16", 2**-8), ("fp16", 2**-11), ("fp8", 2**-4), ("int8", 0.01)]
)
def test_every_codec_is_read_and_those_that_lose_updates_are_not_trained(
    make_bank: Make, codec: str, error: float
) -> None:
    tokens = torch.randint(60, (2, 9))
    exact = make_bank(seed=4).read(tokens).wait(3)["engram"]
    for placement in ("device", "host"):
        found = make_bank(seed=4, codec=codec, placement=placement).read(tokens).wait(3)["engram"]
        assert ((found - exact).abs() <= error * exact.abs().max()).all()
    if codec in ("fp32", "bf16"):
        make_bank(codec=codec, optimizer=RowAdam)
    else:
        with pytest.raises(ValueError, match=f"codec='{codec}' rounds small updates away: train in 'fp32' or 'bf16'"):
            make_bank(codec=codec, optimizer=RowAdam)


def test_misspelt_names_are_told(make_bank: Make) -> None:
    with pytest.raises(ValueError, match="no codec 'fp9' for values: did you mean 'fp8'"):
        make_bank(codec="fp9")
    with pytest.raises(ValueError, match="no codec 'int32' for values"):
        make_bank(codec="int32")
    with pytest.raises(ValueError, match="no placement 'hosts': did you mean 'host'"):
        make_bank(placement="hosts")


@pytest.mark.parametrize("optimizer", [None, RowAdam])
def test_a_cache_that_cannot_be_is_refused_with_the_mend(
    make_bank: Make, stores: dict[str, Any], monkeypatch: pytest.MonkeyPatch, optimizer: Any
) -> None:
    with pytest.raises(
        ValueError, match=r"'lots' is no size: write bytes as a whole number, or with a unit as in '8GB'"
    ):
        make_bank(optimizer=optimizer, cache="lots")
    with pytest.raises(ValueError, match=r"ReadOnlyStore keeps n-grams together by itself: leave out the cache"):
        make_bank(placement=stores["read-only"], cache="1MB")
    with pytest.raises(ValueError, match=r"A cache of 1,000 bytes is too small: give [\d,]+ or more"):
        make_bank(optimizer=optimizer, cache="1KB")

    def full(*args: object, **options: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(slots.torch, "full", full)  # what a table asks for first
    with pytest.raises(ValueError, match=r"cpu has no 8.0 GiB left for a cache: give it less"):
        make_bank(optimizer=optimizer, cache="8GiB")


def test_initial_rows_do_not_depend_on_placement_or_on_who_reads_first(make_bank: Make, device: torch.device) -> None:
    tokens = torch.randint(60, (2, 9))
    first = make_bank(seed=4).read(tokens).wait(3)["engram"]
    assert abs(first.mean()) < 0.1 and abs(first.std() - 0.5) < 0.1
    for placement in ("device", "host"):
        bank = make_bank(seed=4, placement=placement, device=device, optimizer=RowAdam)
        parts = [bank.read(tokens[:, i:].to(device)).wait(1) for i in (5, 2)]
        assert len(parts) == 2
        assert torch.equal(bank.read(tokens.to(device)).wait(3)["engram"].cpu(), first)
    assert not torch.equal(make_bank(seed=5).read(tokens).wait(3)["engram"], first)
    assert not torch.equal(make_bank(seed=4).read(tokens).wait(1)["engram"], first)


def test_a_bank_is_excluded_from_state_dicts_by_having_no_numbers(make_bank: Make) -> None:
    bank = make_bank(optimizer=RowAdam)
    assert all(proxy.numel() == 0 for proxy in bank.parameters())
    assert bank.optimizer is not None and bank.optimizer.state_dict()["state"] == {}


def test_tables_that_do_not_fit_are_refused_with_their_size(make_bank: Make) -> None:
    with pytest.raises(ValueError, match=r"The tables of memory 'engram' take [\d,.]+ GiB .* lower rows_per_head"):
        make_bank({"rows_per_head": 2**44}, optimizer=RowAdam)


def test_a_history_is_told_of_its_tokens_before_read_returns(make_bank: Make) -> None:
    bank = make_bank()
    history = bank.new_history()
    bank.read(Tokens(torch.ones(1, 2, dtype=torch.int64), history=history))
    assert len(history) == 2


def test_what_is_no_tokens_is_refused(make_bank: Make) -> None:
    bank = make_bank()
    for tokens in ([torch.zeros(1, 2).long()], "text", None):
        with pytest.raises(ValueError, match=r"int64 tensor \[B, T\] or as Tokens, not as a (list|str|NoneType)"):
            bank.prefetch(tokens)  # type: ignore[arg-type]
