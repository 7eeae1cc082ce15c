"""Row-wise Adam: one fp32 second moment a row and no first one (docs/spec.md, row optimisers)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from torch_engram.optim.adam import correction
from torch_engram.optim.row_optimizer import RowOptimizer
from torch_engram.stores import DecodedRows, Plane


class RowwiseAdam(RowOptimizer):
    """β1 = 0; v ← β2·v + (1-β2)·mean(g²) over the row; row ← row - lr·g / (sqrt(v/(1-β2^c)) + ε).

    Its state is 8 bytes a row whatever the width. ``weight_decay``, ``lazy_decay``: see :class:`RowOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lazy_decay: bool = False,
    ):
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps}, weight_decay, lazy_decay)

    def moments(self, width: int) -> tuple[Plane, ...]:
        """See :class:`RowOptimizer`."""
        return (Plane("moment", 1),)

    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """See :class:`RowOptimizer`."""
        moment = state["moment"]
        moment.lerp_(grad.square().mean(dim=1, keepdim=True), 1 - group["beta2"])
        unbiased = moment / correction(group["beta2"], state["count"])
        rows.addcdiv_(grad, unbiased.sqrt_() + group["eps"], value=-group["lr"])

    def update_records(
        self, rows: Tensor, grad: Tensor, state: DecodedRows, group: dict[str, Any], kept: float | Tensor
    ) -> bool:
        """See :class:`RowOptimizer`."""
        if type(self).update is not RowwiseAdam.update:  # a subclass with a rule of its own
            return False
        from torch_engram.optim.row_kernels import rowwise_adam_triton

        rowwise_adam_triton(rows, grad, state, group, kept)
        return True
