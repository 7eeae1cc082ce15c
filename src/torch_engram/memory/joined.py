"""The network's optimisers and the banks' as one, for a training loop that knows a single optimiser.

Hugging Face's ``Trainer`` is such a loop. One of your own calls :meth:`WorkingSet.apply` itself and needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from torch_engram.memory.bank import MemoryBank
from torch_engram.memory.working_set import WorkingSet


class JoinedOptimizer(Optimizer):
    """Optimisers of the network and memory banks whose rows are trained with it; all of them step together.

    ``param_groups`` are those of all parts in their order, so a scheduler sets the rates of the rows, too, and a
    gradient scaler unscales their gradients. ``state_dict`` has the usual form; rows and their state are saved with the
    bank. Raises ``ValueError`` for a bank that is only read.
    """

    def __init__(self, *parts: Optimizer | MemoryBank):
        self._networks = [part for part in parts if isinstance(part, Optimizer)]
        self._banks = [part for part in parts if isinstance(part, MemoryBank)]
        self._members = [part if isinstance(part, Optimizer) else _optimizer_of(part) for part in parts]
        if not self._members:
            raise ValueError("JoinedOptimizer() got nothing to join: pass the network's optimiser and the memory bank.")
        super().__init__(self._members[0].param_groups, {})
        self._gather()

    def _gather(self) -> None:
        self.param_groups = [group for member in self._members for group in member.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step the network's optimisers, then apply the working set that each bank has reduced.

        Raises ``ValueError``, before anything changes, where a bank has none, or not yet what other ranks give to it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = [_reduced_by(bank) for bank in self._banks]
        for optimizer in self._networks:
            optimizer.step()
        for step in steps:
            step.apply()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What all parts keep, numbered through; of rows the settings, and which save of the bank they go with."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for member in self._members:
            own = member.state_dict()
            state |= {first + number: kept for number, kept in own["state"].items()}
            groups += [
                {**group, "params": [first + number for number in group["params"]]} for group in own["param_groups"]
            ]
            first += sum(len(group["params"]) for group in own["param_groups"])
        saved = {bank.name: bank.saved[0] for bank in self._banks if bank.saved is not None}
        return {"state": state, "param_groups": groups, "memories": saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`. Raises ``ValueError`` where the groups are not those of the parts, or a bank's
        rows are not those of the save that the state goes with."""
        state, groups = state_dict["state"], list(state_dict["param_groups"])
        for bank in self._banks:
            saved = state_dict.get("memories", {}).get(bank.name)
            if saved is not None and (bank.saved is None or bank.saved[0] != saved):
                raise ValueError(
                    f"The rows of memory {bank.name!r} are not those that this optimiser's state was saved with: load "
                    "them first, with load_bank(), or restore_memories() of an attached one."
                )
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"This state has {len(groups)} parameter groups, not {len(self.param_groups)}: join the same parts, in "
                "the same order, as when it was saved."
            )
        for member in self._members:
            own, groups = groups[: len(member.param_groups)], groups[len(member.param_groups) :]
            numbers = {number for group in own for number in group["params"]}
            kept = {number: value for number, value in state.items() if number in numbers}
            member.load_state_dict({"state": kept, "param_groups": own})
        self._gather()


def _optimizer_of(bank: MemoryBank) -> Optimizer:
    if bank.optimizer is None:
        raise ValueError(f"Memory {bank.name!r} is only read: leave it out, or make it with an optimizer.")
    return bank.optimizer


def _reduced_by(bank: MemoryBank) -> WorkingSet:
    if bank.reduced is None:
        raise ValueError(
            f"Memory {bank.name!r} has no gradients to step with: call reduce() on the working set before step()."
        )
    bank.reduced.require_whole()
    return bank.reduced
