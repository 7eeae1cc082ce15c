"""A joined optimiser is one to whoever steps, schedules, scales and saves, and does what its parts do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from torch_engram.memory import JoinedOptimizer, MemoryBank, WorkingSet
from torch_engram.optim import RowAdam, RowwiseAdam

Make = Callable[..., MemoryBank]
Records = Callable[[MemoryBank], list[Tensor]]


def parts(make_bank: Make) -> tuple[nn.Module, torch.optim.Optimizer, MemoryBank, MemoryBank]:
    torch.manual_seed(1)
    network = nn.Linear(3, 2)
    adam = torch.optim.AdamW([{"params": [network.weight]}, {"params": [network.bias], "lr": 0.5}], lr=0.1)
    one = make_bank(optimizer=lambda rows: RowAdam(rows, lr=0.01))
    other = make_bank(optimizer=lambda rows: RowwiseAdam(rows, lr=0.02), name="other", seed=1)
    return network, adam, one, other


def backward(network: nn.Module, *banks: MemoryBank, scaler: torch.amp.GradScaler | None = None) -> list[WorkingSet]:
    """Gradients everywhere, and the rows of each bank reduced."""
    steps = [bank.prefetch(torch.randint(60, (2, 7))) for bank in banks]
    loss = network(torch.ones(4, 3)).square().mean()
    for step, bank in zip(steps, banks, strict=True):
        loss = loss + sum(step[0].wait(layer)[bank.name].square().mean() for layer in (1, 3))
    (loss if scaler is None else scaler.scale(loss)).backward()
    for step in steps:
        step.reduce()
    return steps


def test_it_does_what_the_parts_do_each_by_itself(make_bank: Make, every_record: Records) -> None:
    found = []
    for joins in (True, False):
        network, adam, *banks = parts(make_bank)
        every = [adam, *(bank.optimizer for bank in banks)]
        joined = [JoinedOptimizer(adam, *banks)] if joins else every
        schedules = [LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in joined]
        rates = []
        torch.manual_seed(2)
        for _ in range(4):
            steps = backward(network, *banks)
            rates.append([group["lr"] for optimizer in every for group in optimizer.param_groups])
            if joins:
                joined[0].step()
                assert all(step.done for step in steps) and not any(bank.reduced for bank in banks)
            else:
                adam.step()
                for step in steps:
                    step.apply()
            network.zero_grad()
            for schedule in schedules:
                schedule.step()
        found.append(([*network.parameters()], [rows for bank in banks for rows in every_record(bank)], rates))
    (weights, rows, rates), (own_weights, own_rows, own_rates) = found
    assert all(map(torch.equal, weights, own_weights)) and all(map(torch.equal, rows, own_rows))
    assert rates == own_rates and rates[1] == [lr / 2 for lr in rates[0]] == [0.05, 0.25, 0.005, 0.01]


def test_its_state_goes_on_where_it_was_saved(make_bank: Make) -> None:
    network, adam, one, other = parts(make_bank)
    joined = JoinedOptimizer(one, adam, other)
    backward(network, one, other)
    joined.step()
    adam.param_groups[1]["lr"] = 0.25
    saved = joined.state_dict()
    assert sorted(saved["state"]) == [2, 3] and [group["lr"] for group in saved["param_groups"]] == [
        0.01, 0.1, 0.25, 0.02
    ]  # fmt: skip
    again, fresh, *banks = parts(make_bank)
    loaded = JoinedOptimizer(banks[0], fresh, banks[1])
    loaded.load_state_dict(saved)
    assert torch.equal(fresh.state[again.weight]["exp_avg"], adam.state[network.weight]["exp_avg"])
    assert [group["lr"] for group in loaded.param_groups] == [0.01, 0.1, 0.25, 0.02]
    loaded.param_groups[-1]["lr"] = 0.5  # what a scheduler would do
    assert banks[1].optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match=r"This state has 4 parameter groups, not 3: join the same parts"):
        JoinedOptimizer(fresh, banks[0]).load_state_dict(saved)


def test_a_step_that_a_gradient_scaler_leaves_out_changes_no_row(make_bank: Make, every_record: Records) -> None:
    network, adam, bank, _ = parts(make_bank)
    joined = JoinedOptimizer(adam, bank)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for spoilt in (True, False):
        before = every_record(bank)
        steps = backward(network, bank, scaler=scaler)
        if spoilt:
            bank.parameters()[0].grad[0] = float("inf")
        scaler.step(joined)
        scaler.update()
        assert steps[0].done is not spoilt
        assert all(map(torch.equal, before, every_record(bank))) is spoilt


def test_what_cannot_be_joined_or_stepped_is_refused(make_bank: Make) -> None:
    network, adam, one, other = parts(make_bank)
    with pytest.raises(ValueError, match=r"got nothing to join: pass the network's optimiser and the memory bank"):
        JoinedOptimizer()
    with pytest.raises(ValueError, match=r"Memory 'engram' is only read: leave it out"):
        JoinedOptimizer(adam, make_bank())
    joined = JoinedOptimizer(adam, one, other)
    backward(network, one)
    before = network.weight.clone()
    with pytest.raises(ValueError, match=r"Memory 'other' has no gradients to step with: call reduce\(\)"):
        joined.step()
    assert torch.equal(network.weight, before)
