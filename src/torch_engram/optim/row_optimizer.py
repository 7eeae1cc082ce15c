"""What every row optimiser shares: it steps on the rows of one working set and keeps no state of its own.

A row optimiser is an ordinary ``torch.optim.Optimizer`` whose parameters are a bank's proxies. Before a step the
bank binds each proxy to the step's rows (``p`` and ``p.grad``: fp32 ``[U, dim]``) and ``state[p]`` to their planes;
after it the rows go back to the store. Schedulers, ``clip_grad_norm_`` and closures work as on any optimiser.

Rows that are kept in their records (``DecodedRows.in_place``, on a GPU) are updated and encoded in one pass by the
optimiser's kernel, where it has one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_engram.optim.lazy_decay import OwedDecay, log_kept
from torch_engram.stores import DecodedRows, Plane


class RowOptimizer(torch.optim.Optimizer, ABC):
    """Base of the touched-rows optimisers (docs/spec.md): a row sees only the steps that touch it.

    ``settings``: of the rule, ``lr`` among them. A step counts each of its rows, then multiplies it by 1 - lr·λ, λ
    being ``weight_decay``, and then updates it. With ``lazy_decay`` it is also multiplied by what it owes: the 1 - lr·λ
    of every step since its last update, each with the rate of that step. Until then it is read as it was left.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        settings: dict[str, Any],
        weight_decay: float = 0.0,
        lazy_decay: bool = False,
    ):
        self.lazy_decay = lazy_decay
        self._owed: list[OwedDecay] = []
        super().__init__(params, {**settings, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See ``torch.optim.Optimizer``; a group counts its own steps."""
        super().add_param_group(param_group)
        self._owed.append(OwedDecay())

    @abstractmethod
    def moments(self, width: int) -> tuple[Plane, ...]:
        """The planes that the rule keeps for rows of ``width`` numbers."""

    def planes(self, width: int) -> tuple[Plane, ...]:
        """The planes that this optimiser keeps for rows of ``width`` numbers, besides ``value`` and ``count``: the
        rule's, and with lazy decay ``last``, the step of the row's last update."""
        return (*self.moments(width), *([Plane("last", 1, "int32")] if self.lazy_decay else []))

    @abstractmethod
    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Change ``rows`` fp32 ``[U, dim]``, which have decayed, and the planes in ``state`` in place.
        ``state["count"]``, int32 ``[U, 1]``, already counts this update."""

    def update_records(
        self, rows: Tensor, grad: Tensor, state: DecodedRows, group: dict[str, Any], kept: float | Tensor
    ) -> bool:
        """Count, decay and update straight in ``state.records``. ``kept``: what rows are multiplied by, one number or
        fp32 ``[U, 1]``. Returns False, with nothing done, where an optimiser has no kernel."""
        return False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the rows that are bound to the proxies; proxies without a gradient are passed over.

        Raises ``ValueError`` for rows whose records an earlier step has made newer than the numbers in the proxies, and
        for a lazy decay that leaves nothing of a row.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepping = [
            (group, owed, proxies)
            for group, owed in zip(self.param_groups, self._owed, strict=True)
            if (proxies := [proxy for proxy in group["params"] if proxy.grad is not None])
        ]
        for _, _, proxies in stepping:
            for proxy in proxies:
                _require_current(self.state[proxy])
        if self.lazy_decay:
            for log, (_, owed, _) in zip([log_kept(group) for group, _, _ in stepping], stepping, strict=True):
                owed.add(log)
        for group, owed, proxies in stepping:
            for proxy in proxies:
                state = self.state[proxy]
                kept = owed.settle(state["last"]) if self.lazy_decay else kept_of(group)
                self._step_rows(proxy, proxy.grad, state, group, kept)
        return loss

    def _step_rows(
        self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], kept: float | Tensor
    ) -> None:
        if isinstance(state, DecodedRows) and state.in_place:
            state.encoded = self.update_records(rows, grad, state, group, kept)
            if state.encoded:
                return
        state["count"] += 1
        rows.mul_(kept)
        self.update(rows, grad, state, group)

    @property
    def owed_decay(self) -> list[list[float]]:
        """For every parameter group the running sums that lazy decay is paid by
        (:class:`~torch_engram.optim.lazy_decay.OwedDecay`); they are saved with the rows, whose ``last`` counts in
        them."""
        return [owed.sums for owed in self._owed]

    def load_owed_decay(self, sums: Sequence[Sequence[float]]) -> None:
        """Go on from saved sums. Raises ``ValueError`` when they are of another number of groups."""
        if len(sums) != len(self._owed):
            raise ValueError(
                f"The saved decay is of {len(sums)} parameter groups, not {len(self._owed)}: build the row optimiser "
                "as it was."
            )
        self._owed = [OwedDecay(group) for group in sums]

    def state_dict(self) -> dict[str, Any]:
        """The groups' settings, and with lazy decay float64 ``owed_decay`` of every group: row state lives in the table
        and is saved with it."""
        owed = {"owed_decay": [torch.tensor(sums, dtype=torch.float64) for sums in self.owed_decay]}
        return {**super().state_dict(), "state": {}, **(owed if self.lazy_decay else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`. Raises ``ValueError`` when one of the two decays lazily and the other does
        not."""
        if self.lazy_decay != ("owed_decay" in state_dict):
            raise ValueError("The saved row optimiser has another lazy_decay: build it as it was.")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "owed_decay"})
        if self.lazy_decay:
            self.load_owed_decay([sums.tolist() for sums in state_dict["owed_decay"]])


def kept_of(group: dict[str, Any]) -> float:
    """What a row is multiplied by before its update: decoupled weight decay (arXiv 1711.05101)."""
    share: float = 1 - float(group["lr"]) * group["weight_decay"]
    return share


def _require_current(state: dict[str, Tensor]) -> None:
    if isinstance(state, DecodedRows) and state.encoded:
        raise ValueError("These rows have taken their step: apply() takes it, so leave out a step() of your own.")
