"""What every row optimiser shares: it steps on the rows of one working set and keeps no state of its own.

A row optimiser is an ordinary ``torch.optim.Optimizer`` whose parameters are a bank's proxies. Before a step the
bank binds each proxy to the step's rows (``p`` and ``p.grad``: fp32 ``[U, dim]``) and ``state[p]`` to their planes;
after it the rows go back to the store. Schedulers, ``clip_grad_norm_`` and closures work as on any optimiser.

Rows that are kept in their records (``DecodedRows.in_place``, on a GPU) are updated and encoded in one pass by the
optimiser's kernel, where it has one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_engram.stores import DecodedRows, Plane


class RowOptimizer(torch.optim.Optimizer, ABC):
    """Base of the touched-rows optimisers (docs/spec.md): a row sees only the steps that touch it."""

    @abstractmethod
    def planes(self, width: int) -> tuple[Plane, ...]:
        """The planes that this optimiser keeps for rows of ``width`` numbers, besides ``value`` and ``count``."""

    @abstractmethod
    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Change ``rows`` fp32 ``[U, dim]`` and the planes in ``state`` in place. ``state["count"]``, int32
        ``[U, 1]``, already counts this update."""

    def update_records(self, rows: Tensor, grad: Tensor, state: DecodedRows, group: dict[str, Any]) -> bool:
        """Do what :meth:`update` does straight to ``state.records``, counting this update. Returns False, with nothing
        done, where an optimiser has no kernel."""
        return False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the rows that are bound to the proxies; proxies without a gradient are passed over.

        Raises ``ValueError`` for rows whose records an earlier step has made newer than the numbers in the proxies.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for proxy in group["params"]:
                if proxy.grad is not None:
                    self._step_rows(proxy, proxy.grad, self.state[proxy], group)
        return loss

    def _step_rows(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if isinstance(state, DecodedRows) and state.in_place:
            if state.encoded:
                raise ValueError(
                    "These rows have taken their step: apply() takes it, so leave out a step() of your own."
                )
            state.encoded = self.update_records(rows, grad, state, group)
            if state.encoded:
                return
        state["count"] += 1
        self.update(rows, grad, state, group)

    def state_dict(self) -> dict[str, Any]:
        """The groups' settings alone: row state lives in the table and is saved with it."""
        return {**super().state_dict(), "state": {}}
