"""Balanced momentum on a GPU: one pass for the momentum, one for each normalisation of columns, one for the update.

The twin of :class:`~torch_engram.optim.RowSinkhorn`, as those in :mod:`torch_engram.optim.row_kernels`. A pass over
columns leaves one partial sum for a block of rows; they are added in a fixed order, so bits repeat.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.optim.row_kernels import constants, decayed, grid, places, strides
from torch_engram.optim.sinkhorn import LIKE_ADAM, TINY, SumOverRanks, column_scales, shortest
from torch_engram.stores import DecodedRows
from torch_engram.stores.counter import seed_term
from torch_engram.stores.record_kernels import store_value, tile

_TILES_A_BLOCK = 16


def sinkhorn_triton(
    rows: Tensor,
    grad: Tensor,
    state: DecodedRows,
    group: dict[str, Any],
    kept: float | Tensor,
    over_ranks: SumOverRanks,
) -> None:
    """One step of balanced momentum on ``rows`` fp32 ``[U, dim]`` with ``grad`` fp32 ``[U, dim]``, into
    ``state.records``. ``kept`` as for :func:`~torch_engram.optim.row_kernels.adam_triton`."""
    momentum, beta = state["momentum"], group["beta"]
    assert momentum.stride(0) == state["count"].stride(0), "the planes are views of one record"
    ahead, lengths = torch.empty(rows.shape, device=rows.device), torch.empty(len(rows), 1, device=rows.device)
    if len(rows):
        _momentum[grid(rows)](
            grad.contiguous(), momentum, ahead, lengths, *rows.shape, momentum.stride(0), beta, 1 - beta,
            **tile(rows.shape[1]),
        )  # fmt: skip
    limit = shortest(lengths, group, over_ranks)
    scales = column_scales(lambda scales: _column_sums(ahead, lengths, limit, scales), rows, group, over_ranks)
    if len(rows):
        _sinkhorn[grid(rows)](
            *places(rows, ahead, state), lengths, limit, scales, *strides(rows, state), seed_term(state.format.seed),
            float(group["lr"]) * LIKE_ADAM, kept, rows.shape[1] ** 0.5, TINY,
            **constants(rows, state, kept),
        )  # fmt: skip


def _column_sums(ahead: Tensor, lengths: Tensor, limit: Tensor, scales: Tensor) -> Tensor:
    sizes = tile(ahead.shape[1])
    blocks = triton.cdiv(len(ahead), sizes["ROWS"] * _TILES_A_BLOCK)
    partial = torch.empty(blocks, ahead.shape[1], device=ahead.device)
    if blocks:
        _columns[(blocks,)](
            ahead, lengths, limit, scales, partial, *ahead.shape, ahead.shape[1] ** 0.5, TINY,
            TILES=_TILES_A_BLOCK, **sizes,
        )  # fmt: skip
    return partial.sum(dim=0, dtype=torch.float64)


@triton.jit
def _momentum(
    grads, momenta, ahead, lengths, rows, dim, stride, beta, rest, ROWS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM).to(tl.int64)
    inside = (row < rows)[:, None] & (column < dim)[None]
    dense, place = row[:, None] * dim + column[None], row[:, None] * stride + column[None]
    grad = tl.load(grads + dense, mask=inside, other=0.0)
    momentum = beta * tl.load(momenta + place, mask=inside, other=0.0) + rest * grad
    number = beta * momentum + rest * grad
    tl.debug_barrier()  # several threads may read a number that one of them writes
    tl.store(momenta + place, momentum, mask=inside)
    tl.store(ahead + dense, number, mask=inside)
    tl.store(lengths + row, tl.sqrt(tl.sum(number * number, axis=1)), mask=row < rows)


@triton.jit
def _unit_rows(ahead, lengths, limit, scales, row, column, rows, dim, root, tiny):
    """Rows of the matrix whose columns are scaled, brought to RMS 1; short ones, and those outside, are zeros."""
    inside = (row < rows)[:, None] & (column < dim)[None]
    short = tl.load(lengths + row, mask=row < rows, other=0.0) <= tl.load(limit)
    scale = tl.load(scales + column, mask=column < dim, other=0.0)
    number = tl.load(ahead + row[:, None] * dim + column[None], mask=inside, other=0.0) * scale[None]
    number = tl.where(short[:, None], 0.0, number)
    length = tl.sqrt(tl.sum(number * number, axis=1))
    return number * (root / tl.maximum(length, tiny, propagate_nan=tl.PropagateNan.ALL))[:, None]


@triton.jit
def _columns(
    ahead, lengths, limit, scales, partial, rows, dim, root, tiny,
    TILES: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DIM).to(tl.int64)
    sums = tl.zeros([DIM], tl.float32)
    first = block * TILES * ROWS
    for start in range(first, tl.minimum(first + TILES * ROWS, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        unit = _unit_rows(ahead, lengths, limit, scales, row, column, rows, dim, root, tiny)
        sums += tl.sum(unit * unit, axis=0)
    tl.store(partial + block * dim + column, sums, mask=column < dim)


@triton.jit
def _sinkhorn(
    values, ahead, stored, keys, counts, lengths, limit, scales,
    rows, dim, value_stride, stored_stride, stride, seed_term,
    lr, kept, root, tiny,
    PLANE: tl.constexpr, STOCHASTIC: tl.constexpr, LAZY: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM).to(tl.int64)
    inside = (row < rows)[:, None] & (column < dim)[None]
    key = tl.load(keys + row, mask=row < rows, other=0)
    count = tl.load(counts + row * stride, mask=row < rows, other=0) + 1
    value = tl.load(values + row[:, None] * value_stride + column[None], mask=inside, other=0.0)
    unit = _unit_rows(ahead, lengths, limit, scales, row, column, rows, dim, root, tiny)
    tl.debug_barrier()  # several threads may read a number that one of them writes
    value = decayed(value, kept, row, rows, LAZY) - lr * unit
    tl.store(counts + row * stride, count, mask=row < rows)
    at = row[:, None] * stored_stride + column[None]
    store_value(stored, at, value, inside, key, count, column, seed_term, PLANE, STOCHASTIC)
