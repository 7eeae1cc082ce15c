"""A step of decoding is read at once out of the device's memory, and is what the whole sequence has there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_engram.memory import MemoryBank, Tokens
from torch_engram.optim import RowAdam, RowwiseAdam

Make = Callable[..., MemoryBank]
SHAPE = (3, 9)


def trained(bank: MemoryBank, ids: Tensor) -> MemoryBank:
    """Some rows away from their start, others as nobody has written them."""
    step = bank.prefetch(ids[:, ::2].to(bank.device))
    sum(step[0].wait(layer)["engram"].sum() for layer in bank.config.layers).backward()  # type: ignore[union-attr]
    step.reduce()
    step.apply()
    return bank


def require_steps_as_whole(bank: MemoryBank, batch: Tokens) -> None:
    history, layers = bank.new_history(), bank.config.layers
    whole = bank.read(batch)
    for at in range(SHAPE[1]):
        now = (None if given is None else given[:, at : at + 1] for given in (batch.ids, batch.doc_start, batch.live))
        memory = bank.read(Tokens(*now, history))
        assert memory.wait(17) == {}
        for layer in layers:
            found, expected = memory.wait(layer)["engram"], whole.wait(layer)["engram"][:, at : at + 1]
            assert found.dtype == bank.dtype and not found.requires_grad and torch.equal(found, expected)


@pytest.mark.parametrize("config, options", [
    ({}, dict(optimizer=RowAdam)), (dict(init_std=0.0), dict(optimizer=RowAdam)),
    (dict(row_dim=(4, 3)), dict(optimizer=RowwiseAdam, codec="bf16")),
    (dict(row_dim=(5, 2), init_std=0.0), dict(optimizer=RowAdam, codec="bf16", dtype=torch.bfloat16)), ({}, {}),
])  # fmt: skip
def test_equals_the_whole(make_bank: Make, device: torch.device, config: dict[str, Any], options: Any) -> None:
    bank = make_bank(config, device=device, **options)
    assert bank._step_reads is not None
    ids = torch.randint(60, SHAPE).to(device)
    if bank.optimizer is not None:
        trained(bank, ids)
    starts, live = (torch.rand(SHAPE).to(device) < share for share in (0.2, 0.7))
    require_steps_as_whole(bank, Tokens(ids))
    require_steps_as_whole(bank, Tokens(ids, starts, live))


def test_sees_what_was_written_last(make_bank: Make, device: torch.device) -> None:
    bank, ids = make_bank(device=device, optimizer=RowAdam), torch.randint(60, (1, 6)).to(device)
    history = bank.new_history()
    bank.read(Tokens(ids[:, :5], history=history)).wait(1)
    before = bank.read(Tokens(ids[:, 5:], history=history)).wait(1)["engram"]
    history.reset()
    bank.read(Tokens(ids[:, :5], history=history)).wait(1)
    trained(bank, ids.repeat_interleave(2, 1))
    after = bank.read(Tokens(ids[:, 5:], history=history)).wait(1)["engram"]
    assert not torch.equal(before, after) and torch.equal(after, bank.read(ids).wait(1)["engram"][:, 5:])


def test_no_thread_is_asked(make_bank: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(optimizer=RowAdam)
    history = bank.new_history()
    bank.read(Tokens(torch.tensor([[1, 2]]), history=history)).wait(1)
    monkeypatch.setattr(bank, "_prefetcher", None)
    assert bank.read(Tokens(torch.tensor([[3]]), history=history)).wait(1)["engram"].shape == (1, 1, 16)
    with pytest.raises(ValueError, match="outside this memory's vocabulary"):
        bank.read(Tokens(torch.tensor([[60]]), history=history))
    assert make_bank(optimizer=RowAdam, placement="host")._step_reads is None
    assert make_bank(cache="1MB")._step_reads is None
