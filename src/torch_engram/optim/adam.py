"""Adam on touched rows, each row with its own step count (docs/spec.md, row optimisers)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torch_engram.optim.row_optimizer import RowOptimizer
from torch_engram.stores import DecodedRows, Plane


class RowAdam(RowOptimizer):
    """Row Adam: two fp32 moments of the row's width.

    With c the row's own number of updates: m ← β1·m + (1-β1)·g, v ← β2·v + (1-β2)·g²,
    row ← row - lr·(m/(1-β1^c)) / (sqrt(v/(1-β2^c)) + ε). ``weight_decay``, ``lazy_decay``: see :class:`RowOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lazy_decay: bool = False,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, weight_decay, lazy_decay)

    def moments(self, width: int) -> tuple[Plane, ...]:
        """See :class:`RowOptimizer`."""
        return Plane("mean", width), Plane("moment", width)

    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """See :class:`RowOptimizer`."""
        beta1, beta2 = group["betas"]
        mean, moment = state["mean"], state["moment"]
        mean.lerp_(grad, 1 - beta1)
        moment.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        unbias1, unbias2 = (correction(beta, state["count"]) for beta in (beta1, beta2))
        rows.sub_(group["lr"] * (mean / unbias1) / ((moment / unbias2).sqrt_() + group["eps"]))

    def update_records(
        self, rows: Tensor, grad: Tensor, state: DecodedRows, group: dict[str, Any], kept: float | Tensor
    ) -> bool:
        """See :class:`RowOptimizer`."""
        if type(self).update is not RowAdam.update:  # a subclass with a rule of its own
            return False
        from torch_engram.optim.row_kernels import adam_triton

        adam_triton(rows, grad, state, group, kept)
        return True


def correction(beta: float, count: Tensor) -> Tensor:
    """1 - beta^count for each row, in float64 and then fp32: a young row's correction is a small difference."""
    return (1 - torch.pow(beta, count.double())).float()
