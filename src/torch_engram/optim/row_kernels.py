"""Row optimisers on a GPU in one pass: gradient, moments, count, decay, rounding and encoded record, row by row.

Twins of what :class:`~torch_engram.optim.RowAdam`, :class:`~torch_engram.optim.RowwiseAdam` and
:class:`~torch_engram.optim.RowAdagrad` do, followed by :meth:`~torch_engram.stores.RowFormat.encode`. The random bits
of stochastic rounding are the same; numbers may differ in their last place, because a GPU joins products and sums.
Offsets are int64.
"""

from __future__ import annotations

import math
from ctypes import c_float
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from torch_engram.stores import DecodedRows
from torch_engram.stores.counter import seed_term
from torch_engram.stores.record_kernels import store_value, tile


def adam_triton(rows: Tensor, grad: Tensor, state: DecodedRows, group: dict[str, Any], kept: float | Tensor) -> None:
    """One step of Row Adam on ``rows`` fp32 ``[U, dim]`` with ``grad`` fp32 ``[U, dim]``, into ``state.records``.

    ``kept``: what rows are multiplied by before, one number or fp32 ``[U, 1]``.
    """
    (beta1, beta2), mean, moment = group["betas"], state["mean"], state["moment"]
    assert mean.stride(0) == moment.stride(0) == state["count"].stride(0), "the planes are views of one record"
    if not len(rows):
        return
    _adam[grid(rows)](
        *places(rows, grad, state), mean, moment, *strides(rows, state), seed_term(state.format.seed),
        float(group["lr"]), kept, beta1, 1 - beta1, *_log(beta1), beta2, 1 - beta2, *_log(beta2), group["eps"],
        **constants(rows, state, kept),
    )  # fmt: skip


def rowwise_adam_triton(
    rows: Tensor, grad: Tensor, state: DecodedRows, group: dict[str, Any], kept: float | Tensor
) -> None:
    """One step of row-wise Adam, as :func:`adam_triton`."""
    beta2, moment = group["beta2"], state["moment"]
    assert moment.stride(0) == state["count"].stride(0), "the planes are views of one record"
    if not len(rows):
        return
    _rowwise_adam[grid(rows)](
        *places(rows, grad, state), moment, *strides(rows, state), seed_term(state.format.seed),
        float(group["lr"]), kept, beta2, 1 - beta2, *_log(beta2), group["eps"],
        **constants(rows, state, kept),
    )  # fmt: skip


def adagrad_triton(rows: Tensor, grad: Tensor, state: DecodedRows, group: dict[str, Any], kept: float | Tensor) -> None:
    """One step of Row Adagrad, as :func:`adam_triton`."""
    squares = state["squares"]
    assert squares.stride(0) == state["count"].stride(0), "the planes are views of one record"
    if not len(rows):
        return
    _adagrad[grid(rows)](
        *places(rows, grad, state), squares, *strides(rows, state), seed_term(state.format.seed),
        float(group["lr"]), kept, group["eps"],
        **constants(rows, state, kept),
    )  # fmt: skip


def grid(rows: Tensor) -> tuple[int]:
    """Programs of a kernel that takes rows by tiles."""
    return (triton.cdiv(len(rows), tile(rows.shape[1])["ROWS"]),)


def places(rows: Tensor, grad: Tensor, state: DecodedRows) -> tuple[Tensor, ...]:
    """Where a kernel finds decoded values and gradients, and stored values, keys and counts."""
    return rows, grad.contiguous(), state.stored("value"), state.row_keys, state["count"]


def strides(rows: Tensor, state: DecodedRows) -> tuple[int, ...]:
    """U, dim, and how far rows lie apart: decoded values, stored values, the other planes."""
    return *rows.shape, rows.stride(0), state.stored("value").stride(0), state["count"].stride(0)


def constants(rows: Tensor, state: DecodedRows, kept: float | Tensor) -> dict[str, Any]:
    """What a kernel is compiled for: how values are stored, whether each row decays by its own share, its tile."""
    number = [plane.name for plane in state.format.layout.planes].index("value")
    stochastic = state.stored("value").dtype != rows.dtype
    return {"PLANE": number, "STOCHASTIC": stochastic, "LAZY": isinstance(kept, Tensor), **tile(rows.shape[1])}


def _log(beta: float) -> tuple[float, float]:
    """The logarithm of beta in two fp32 numbers, since a kernel takes no double."""
    if beta == 0:
        return -math.inf, 0.0
    high = c_float(math.log(beta)).value
    return high, math.log(beta) - high


@triton.jit
def _correction(count, log_high, log_low):
    """1 - beta^count, in float64 and then fp32: a young row's correction is a small difference."""
    exact = count.to(tl.float64)
    return (1.0 - tl.exp(exact * log_high + exact * log_low)).to(tl.float32)


@triton.jit
def decayed(value, kept, row, rows, LAZY: tl.constexpr):
    """``[rows, columns]`` times ``kept``: one number, or the place of one for each row."""
    if LAZY:
        share = tl.load(kept + row, mask=row < rows, other=0.0)[:, None]
    else:
        share = kept
    return share * value


@triton.jit
def _adam(
    values, grads, stored, keys, counts, means, moments,
    rows, dim, value_stride, stored_stride, stride, seed_term,
    lr, kept, beta1, rest1, log1_high, log1_low, beta2, rest2, log2_high, log2_low, eps,
    PLANE: tl.constexpr, STOCHASTIC: tl.constexpr, LAZY: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM).to(tl.int64)
    inside = (row < rows)[:, None] & (column < dim)[None]
    key = tl.load(keys + row, mask=row < rows, other=0)
    count = tl.load(counts + row * stride, mask=row < rows, other=0) + 1
    place = row[:, None] * stride + column[None]
    value = tl.load(values + row[:, None] * value_stride + column[None], mask=inside, other=0.0)
    grad = tl.load(grads + row[:, None] * dim + column[None], mask=inside, other=0.0)
    mean = beta1 * tl.load(means + place, mask=inside, other=0.0) + rest1 * grad
    moment = beta2 * tl.load(moments + place, mask=inside, other=0.0) + rest2 * grad * grad
    tl.debug_barrier()  # several threads may read a number that one of them writes
    unbiased = mean / _correction(count, log1_high, log1_low)[:, None]
    spread = tl.sqrt(moment / _correction(count, log2_high, log2_low)[:, None])
    value = decayed(value, kept, row, rows, LAZY) - lr * unbiased / (spread + eps)
    tl.store(counts + row * stride, count, mask=row < rows)
    tl.store(means + place, mean, mask=inside)
    tl.store(moments + place, moment, mask=inside)
    at = row[:, None] * stored_stride + column[None]
    store_value(stored, at, value, inside, key, count, column, seed_term, PLANE, STOCHASTIC)


@triton.jit
def _rowwise_adam(
    values, grads, stored, keys, counts, moments,
    rows, dim, value_stride, stored_stride, stride, seed_term,
    lr, kept, beta2, rest2, log2_high, log2_low, eps,
    PLANE: tl.constexpr, STOCHASTIC: tl.constexpr, LAZY: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM).to(tl.int64)
    inside = (row < rows)[:, None] & (column < dim)[None]
    key = tl.load(keys + row, mask=row < rows, other=0)
    count = tl.load(counts + row * stride, mask=row < rows, other=0) + 1
    old = tl.load(moments + row * stride, mask=row < rows, other=0.0)
    value = tl.load(values + row[:, None] * value_stride + column[None], mask=inside, other=0.0)
    grad = tl.load(grads + row[:, None] * dim + column[None], mask=inside, other=0.0)
    tl.debug_barrier()  # several threads may read a number that one of them writes
    moment = beta2 * old + rest2 * (tl.sum(grad * grad, axis=1) / dim)
    spread = tl.sqrt(moment / _correction(count, log2_high, log2_low))
    value = decayed(value, kept, row, rows, LAZY) - lr * grad / (spread + eps)[:, None]
    tl.store(counts + row * stride, count, mask=row < rows)
    tl.store(moments + row * stride, moment, mask=row < rows)
    at = row[:, None] * stored_stride + column[None]
    store_value(stored, at, value, inside, key, count, column, seed_term, PLANE, STOCHASTIC)


@triton.jit
def _adagrad(
    values, grads, stored, keys, counts, squares,
    rows, dim, value_stride, stored_stride, stride, seed_term,
    lr, kept, eps,
    PLANE: tl.constexpr, STOCHASTIC: tl.constexpr, LAZY: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM).to(tl.int64)
    inside = (row < rows)[:, None] & (column < dim)[None]
    key = tl.load(keys + row, mask=row < rows, other=0)
    count = tl.load(counts + row * stride, mask=row < rows, other=0) + 1
    place = row[:, None] * stride + column[None]
    value = tl.load(values + row[:, None] * value_stride + column[None], mask=inside, other=0.0)
    grad = tl.load(grads + row[:, None] * dim + column[None], mask=inside, other=0.0)
    total = tl.load(squares + place, mask=inside, other=0.0) + grad * grad
    tl.debug_barrier()  # several threads may read a number that one of them writes
    value = decayed(value, kept, row, rows, LAZY) - lr * grad / (tl.sqrt(total) + eps)
    tl.store(counts + row * stride, count, mask=row < rows)
    tl.store(squares + place, total, mask=inside)
    at = row[:, None] * stored_stride + column[None]
    store_value(stored, at, value, inside, key, count, column, seed_term, PLANE, STOCHASTIC)
