"""What surrounds the grouped products of a mixture of experts, in Triton; the twin of all of it is ``moe_naive``.

n tokens, k experts a token, R = n * k rows in expert order, d hidden, f inner width. Types come from the inputs, sums
are fp32 and rounded once. Rows and tokens are int64 in addresses: R * d may pass 2**31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ITEMS = 512
"""Choices that one program counts and sorts."""
_TILE = 8192
"""Numbers of a tile of choices by experts."""
_TOKENS, _COLUMNS = 8, 512
_ROW_NUMBERS = 4096


def _count(chosen: Tensor, live: Tensor | None, experts: int) -> Tensor:
    """int32 ``[experts, blocks]``: how often each block of choices names each expert."""
    items, top_k = chosen.numel(), chosen.shape[1]
    blocks = triton.cdiv(items, _ITEMS)
    counts = chosen.new_empty(experts, blocks, dtype=torch.int32)
    width = triton.next_power_of_2(experts)
    _count_kernel[(blocks,)](
        chosen, chosen if live is None else live, counts, items, experts, blocks,
        K=top_k, MASKED=live is not None, ITEMS=_ITEMS, STEP=_step(width), WIDTH=width,
    )  # fmt: skip
    return counts


def _step(width: int) -> int:
    return max(16, min(_ITEMS, _TILE // width))


def count_triton(chosen: Tensor, live: Tensor | None, experts: int) -> Tensor:
    """fp32 ``[experts]``: tokens that chose each expert, of those where ``live`` (int8 ``[n]``) is not 0."""
    return _count(chosen, live, experts).sum(1, dtype=torch.float32)


def order_triton(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The choices sorted by expert, those of one expert in their own order; ``chosen`` is contiguous ``[n, k]``.

    int32 ``order`` ``[R]`` (the choice in each place), ``inverse`` ``[n, k]`` (the place of each choice) and ``ends``
    ``[experts]`` (the place after each expert's last).
    """
    counts = _count(chosen, None, experts)
    # Blocks come last, so one running sum is both where an expert begins and where a block begins in it.
    until = counts.flatten().cumsum(0, dtype=torch.int32)
    order = chosen.new_empty(chosen.numel(), dtype=torch.int32)
    inverse = chosen.new_empty(chosen.shape, dtype=torch.int32)
    width, blocks = triton.next_power_of_2(experts), counts.shape[1]
    _order_kernel[(blocks,)](
        chosen, counts, until, order, inverse, chosen.numel(), experts, blocks,
        ITEMS=_ITEMS, STEP=_step(width), WIDTH=width,
    )  # fmt: skip
    return order, inverse, until.view(experts, blocks)[:, -1].contiguous()


def spread_triton(x: Tensor, inverse: Tensor) -> Tensor:
    """Each row of ``x`` ``[n, d]`` copied to its k places: ``[R, d]``."""
    tokens, width = x.shape
    rows = x.new_empty(inverse.numel(), width)
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    grid = (triton.cdiv(tokens, _TOKENS), triton.cdiv(width, columns))
    _spread[grid](x, inverse, rows, tokens, width, K=inverse.shape[1], TOKENS=_TOKENS, COLUMNS=columns)
    return rows


def collect_triton(rows: Tensor, inverse: Tensor, added: Tensor | None) -> Tensor:
    """The sum of each token's k rows, and of ``added`` ``[n, d]``: ``[n, d]`` of the rows' type."""
    tokens, top_k = inverse.shape
    width = rows.shape[1]
    total = rows.new_empty(tokens, width)
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    grid = (triton.cdiv(tokens, _TOKENS), triton.cdiv(width, columns))
    _collect[grid](
        rows, inverse, rows if added is None else added, total, tokens, width,
        K=top_k, ADD=added is not None, TOKENS=_TOKENS, COLUMNS=columns,
    )  # fmt: skip
    return total


def activate_triton(gate_up: Tensor, gates: Tensor, order: Tensor) -> Tensor:
    """silu(gate) * up * the choice's gate, ``[R, f]``, from ``gate_up`` ``[R, 2f]`` and fp32 ``gates`` ``[n, k]``."""
    inner = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    rows, columns, grid = _whole_rows(inner)
    _activate[grid](gate_up, gates, order, inner, *inner.shape, ROWS=rows, COLUMNS=columns, num_warps=8)
    return inner


def activate_backward_triton(grad: Tensor, gate_up: Tensor, gates: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate_up`` and ``gates`` from that of what :func:`activate_triton` gives."""
    grad_gate_up, grad_gates = torch.empty_like(gate_up), torch.empty_like(gates)
    rows, columns, grid = _whole_rows(grad)
    _activate_backward[grid](
        grad, gate_up, gates, order, grad_gate_up, grad_gates, *grad.shape,
        ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    return grad_gate_up, grad_gates


def _whole_rows(inner: Tensor) -> tuple[int, int, tuple[int]]:
    columns = triton.next_power_of_2(inner.shape[1])
    rows = max(1, _ROW_NUMBERS // columns)
    return rows, columns, (triton.cdiv(inner.shape[0], rows),)


@triton.jit
def _count_kernel(
    chosen, live, counts, items, experts, blocks,
    K: tl.constexpr, MASKED: tl.constexpr, ITEMS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    name = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.int32)
    for start in range(0, ITEMS, STEP):
        item = block * ITEMS + start + tl.arange(0, STEP)
        counted = item < items
        if MASKED:
            counted = counted & (tl.load(live + item // K, mask=counted, other=0) != 0)
        expert = tl.load(chosen + item, mask=counted, other=-1)
        total += tl.sum((expert[:, None] == name[None]).to(tl.int32), axis=0)
    tl.store(counts + name * blocks + block, total, mask=name < experts)


@triton.jit
def _order_kernel(
    chosen, counts, until, order, inverse, items, experts, blocks,
    ITEMS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    name = tl.arange(0, WIDTH)
    at = name * blocks + block
    free = tl.load(until + at, mask=name < experts, other=0) - tl.load(counts + at, mask=name < experts, other=0)
    for start in range(0, ITEMS, STEP):
        item = block * ITEMS + start + tl.arange(0, STEP)
        expert = tl.load(chosen + item, mask=item < items, other=-1)
        hit = (expert[:, None] == name[None]).to(tl.int32)
        place = tl.sum(hit * (free[None] + tl.cumsum(hit, axis=0) - 1), axis=1)
        tl.store(order + place, item, mask=item < items)
        tl.store(inverse + item, place, mask=item < items)
        free += tl.sum(hit, axis=0)


@triton.jit
def _spread(x, inverse, rows, tokens, width, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < tokens)[:, None] & (column < width)[None]
    value = tl.load(x + token[:, None] * width + column[None], mask=inside)
    for slot in tl.static_range(K):
        place = tl.load(inverse + token * K + slot, mask=token < tokens, other=0).to(tl.int64)
        tl.store(rows + place[:, None] * width + column[None], value, mask=inside)


@triton.jit
def _collect(
    rows, inverse, added, out, tokens, width,
    K: tl.constexpr, ADD: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < tokens)[:, None] & (column < width)[None]
    at = token[:, None] * width + column[None]
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    if ADD:
        total += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(K):
        place = tl.load(inverse + token * K + slot, mask=token < tokens, other=0).to(tl.int64)
        total += tl.load(rows + place[:, None] * width + column[None], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _activate(gate_up, gates, order, inner, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < width)[None]
    at = gate_up + row[:, None] * (2 * width) + column[None]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(gates + tl.load(order + row, mask=row < count, other=0))
    value = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(inner + row[:, None] * width + column[None], value.to(inner.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward(
    grad, gate_up, gates, order, grad_gate_up, grad_gates, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < width)[None]
    at = row[:, None] * (2 * width) + column[None]
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row[:, None] * width + column[None], mask=inside, other=0.0).to(tl.float32)
    choice = tl.load(order + row, mask=row < count, other=0)
    weight = tl.load(gates + choice)[:, None]
    share = tl.sigmoid(gate)
    silu = gate * share
    tl.store(grad_gates + choice, tl.sum(g * silu * up, axis=1), mask=row < count)
    grad_gate = g * weight * up * share * (1.0 + gate * (1.0 - share))
    tl.store(grad_gate_up + at, grad_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate_up + at + width, (g * weight * silu).to(grad_gate_up.dtype.element_ty), mask=inside)
