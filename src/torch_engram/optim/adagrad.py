"""Adagrad on touched rows (docs/spec.md, row optimisers)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from torch_engram.optim.row_optimizer import RowOptimizer
from torch_engram.stores import DecodedRows, Plane


class RowAdagrad(RowOptimizer):
    """Row Adagrad: one fp32 sum of squares for each number. s ← s + g², row ← row - lr·g / (sqrt(s) + ε).

    A row without gradient stands still, so this is Adagrad on the whole table. ``weight_decay``, ``lazy_decay``: see
    :class:`RowOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        lazy_decay: bool = False,
    ):
        super().__init__(params, {"lr": lr, "eps": eps}, weight_decay, lazy_decay)

    def moments(self, width: int) -> tuple[Plane, ...]:
        """See :class:`RowOptimizer`."""
        return (Plane("squares", width),)

    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """See :class:`RowOptimizer`."""
        squares = state["squares"]
        squares.addcmul_(grad, grad)
        rows.addcdiv_(grad, squares.sqrt().add_(group["eps"]), value=-float(group["lr"]))

    def update_records(
        self, rows: Tensor, grad: Tensor, state: DecodedRows, group: dict[str, Any], kept: float | Tensor
    ) -> bool:
        """See :class:`RowOptimizer`."""
        if type(self).update is not RowAdagrad.update:  # a subclass with a rule of its own
            return False
        from torch_engram.optim.row_kernels import adagrad_triton

        adagrad_triton(rows, grad, state, group, kept)
        return True
