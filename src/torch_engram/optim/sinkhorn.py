"""Sinkhorn-balanced momentum on touched rows (docs/spec.md, row optimisers), after arXiv 2609.19969.

The touched rows of a table in one step are one matrix. Its rows and columns are brought to the same norm in turns, so
that no n-gram and no direction outweighs the others; what is kept is one momentum. Each row is normalised last, so a
balanced matrix is known by one number a column: :func:`column_scales`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torch_engram.optim.row_optimizer import RowOptimizer
from torch_engram.stores import DecodedRows, Plane

LIKE_ADAM = 0.18
"""Size of an update whose learning rate is 1: about Adam's."""
TINY = 1e-20
"""What norms are raised to, so that rows of zeros stay zeros."""

SumOverRanks = Callable[[Tensor], Tensor]


class RowSinkhorn(RowOptimizer):
    """Balanced momentum: one fp32 number for each number.

    m ← β·m + (1-β)·g, x = β·m + (1-β)·g; rows of x that are no longer than ``threshold`` times the mean length of the
    step's rows are zeroed; ``normalizations`` times, an odd number, first its rows and then its columns are brought to
    the same norm in turns; row ← row - lr·0.18·u, where u has RMS 1 in every row but those. No bias correction: a
    young row's short momentum is normalised as any other. ``weight_decay``, ``lazy_decay``: see :class:`RowOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-2,
        beta: float = 0.95,
        normalizations: int = 11,
        threshold: float = 1e-3,
        weight_decay: float = 0.0,
        lazy_decay: bool = False,
    ):
        if normalizations < 1 or normalizations % 2 == 0:
            raise ValueError(f"normalizations={normalizations} would not end with rows: give an odd number, 1 or more.")
        settings = {"lr": lr, "beta": beta, "normalizations": normalizations, "threshold": threshold}
        super().__init__(params, settings, weight_decay, lazy_decay)
        self.over_ranks: SumOverRanks = _alone
        """Adds a float64 tensor up over the processes that share a table's rows, in a fixed order. It is called as
        often on each of them, also where a step touches none of its rows."""

    def moments(self, width: int) -> tuple[Plane, ...]:
        """See :class:`RowOptimizer`."""
        return (Plane("momentum", width),)

    def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """See :class:`RowOptimizer`."""
        rest = 1 - group["beta"]
        ahead = state["momentum"].lerp_(grad, rest).lerp(grad, rest)
        lengths = ahead.norm(dim=1, keepdim=True)
        ahead = ahead.masked_fill_(lengths <= shortest(lengths, group, self.over_ranks), 0.0)
        scales = column_scales(lambda scales: _column_sums(ahead, scales), rows, group, self.over_ranks)
        rows.sub_(_unit_rows(ahead * scales).mul_(float(group["lr"]) * LIKE_ADAM))

    def update_records(
        self, rows: Tensor, grad: Tensor, state: DecodedRows, group: dict[str, Any], kept: float | Tensor
    ) -> bool:
        """See :class:`RowOptimizer`."""
        if type(self).update is not RowSinkhorn.update:  # a subclass with a rule of its own
            return False
        from torch_engram.optim.sinkhorn_kernels import sinkhorn_triton

        sinkhorn_triton(rows, grad, state, group, kept, self.over_ranks)
        return True


def shortest(lengths: Tensor, group: dict[str, Any], over_ranks: SumOverRanks) -> Tensor:
    """The length up to which rows are zeroed, an fp32 scalar: ``threshold`` times the mean of ``lengths`` fp32
    ``[U, 1]`` on all ranks."""
    total = lengths.sum(dtype=torch.float64)
    total, count = over_ranks(torch.stack((total, torch.full_like(total, len(lengths)))))
    limit: Tensor = (group["threshold"] * total / count).float()
    return limit


def column_scales(
    column_sums: Callable[[Tensor], Tensor], rows: Tensor, group: dict[str, Any], over_ranks: SumOverRanks
) -> Tensor:
    """What columns are multiplied by before rows are normalised for the last time, fp32 ``[dim]``.

    ``column_sums``: given the scales so far, the sums of squares float64 ``[dim]`` of this rank's columns with rows
    normalised. A column of zeros stays one. A factor that all columns share changes nothing; they are divided by their
    norm over its root mean square, so that none grows or vanishes with the number of rows.
    """
    scales = torch.ones(rows.shape[1], dtype=torch.float64, device=rows.device)
    for _ in range(group["normalizations"] // 2):
        sums = over_ranks(column_sums(scales.float()))
        scales = scales * torch.where(sums == 0, 1.0, (sums.mean() / sums).sqrt())
    return scales.float()


def _column_sums(matrix: Tensor, scales: Tensor) -> Tensor:
    return _unit_rows(matrix * scales).square_().sum(dim=0, dtype=torch.float64)


def _unit_rows(matrix: Tensor) -> Tensor:
    """Rows of RMS 1, changed in place; rows of zeros stay."""
    return matrix.mul_(matrix.shape[1] ** 0.5 / matrix.norm(dim=1, keepdim=True).clamp_(min=TINY))


def _alone(sums: Tensor) -> Tensor:
    """One process has all rows."""
    return sums
