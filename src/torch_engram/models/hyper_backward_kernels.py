"""The way back through hyper-connections in Triton; shapes and types as in :mod:`torch_engram.models.hyper_kernels`.

No program adds to what another one writes: gradients of parameters are sums of partial sums in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.models.hyper_kernels import matrix_width, positive, product

_LOGITS_TOKENS, _LOGITS_COLUMNS = 32, 64
_STREAMS_TOKENS, _SPLITS = 32, 32
_WRITE_NUMBERS = 2048
"""Numbers of one branch that a program of write's way back holds."""


def read_backward_triton(
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    streams: Tensor,
    weight: Tensor,
    strength: Tensor,
    static: Tensor,
    saved: tuple[Tensor, Tensor],
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, weight, strength and static from those of read, H_res, H_post and streams elsewhere.

    ``saved`` are ``dynamic`` and the norm's factor.
    """
    tokens, branches, width = streams.shape
    count = len(static)
    programs = triton.cdiv(tokens, _LOGITS_TOKENS)
    shapes = ((tokens, count), (tokens,), (programs, 2, count))
    raw, shrink, partial = (streams.new_empty(shape, dtype=torch.float32) for shape in shapes)
    _logits_backward[(programs,)](
        streams, *grads[:3], strength, static, *saved, raw, shrink, partial, tokens, width, iterations,
        M=branches, Q=matrix_width(branches), KEPT=triton.next_power_of_2(iterations),
        TOKENS=_LOGITS_TOKENS, COLUMNS=_LOGITS_COLUMNS, num_warps=8,
    )  # fmt: skip
    splits = min(_SPLITS, triton.cdiv(tokens, _STREAMS_TOKENS))
    span = triton.cdiv(triton.cdiv(tokens, splits), _STREAMS_TOKENS) * _STREAMS_TOKENS
    grad_streams = torch.empty_like(streams)
    grad_weight = weight.new_empty(splits, *weight.shape)
    padded = max(16, triton.next_power_of_2(count))
    columns = 128 if padded <= 32 else 64  # with more coefficients, wider tiles do not fit
    chunks = triton.cdiv(width, columns)
    _streams_backward[(branches * chunks, splits)](
        streams, grads[0], grads[3], weight, strength, static, saved[0], raw, shrink, grad_streams, grad_weight,
        tokens, width, chunks, span, M=branches, COUNT=padded,
        SHORT=streams.dtype == torch.bfloat16, TOKENS=_STREAMS_TOKENS, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    grad_static, grad_strength = partial.sum(0)
    parts = grad_strength.split((branches, branches, branches**2))
    return grad_streams, grad_weight.sum(0), torch.stack([part.sum() for part in parts]), grad_static.clone()


def write_backward_triton(
    grad: Tensor, streams: Tensor, output: Tensor, h_res: Tensor, h_post: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, output, H_res and H_post from that of what was written, ``[n, M, d]``."""
    tokens, branches, width = streams.shape
    grads = tuple(torch.empty_like(tensor) for tensor in (streams, output, h_res, h_post))
    columns = triton.next_power_of_2(width)
    step = max(1, _WRITE_NUMBERS // columns)
    _write_backward[(triton.cdiv(tokens, step),)](
        grad, streams, output, h_res, h_post, *grads, tokens, width,
        M=branches, CELLS=triton.next_power_of_2(branches**2), TOKENS=step, COLUMNS=columns,
    )  # fmt: skip
    return grads[0], grads[1], grads[2], grads[3]


@triton.jit
def _sinkhorn_backward(grad, start, iterations, KEPT: tl.constexpr, TOKENS: tl.constexpr, Q: tl.constexpr):
    """Gradient of ``start`` from that of the matrix that it becomes, ``[TOKENS, Q, Q]``.

    The sums of columns and rows are kept on the way there. On the way back they undo each division: no iterate is
    kept.
    """
    kept = tl.arange(0, KEPT)[None, :, None]
    columns, rows = tl.zeros([TOKENS, KEPT, Q], tl.float32), tl.zeros([TOKENS, KEPT, Q], tl.float32)
    matrix = start
    for step in range(iterations):
        total = tl.sum(matrix, axis=1)
        columns = tl.where(kept == step, total[:, None, :], columns)
        matrix = matrix / total[:, None, :]
        total = tl.sum(matrix, axis=2)
        rows = tl.where(kept == step, total[:, None, :], rows)
        matrix = matrix / total[:, :, None]
    for back in range(iterations):
        step = iterations - 1 - back
        total = tl.sum(tl.where(kept == step, rows, 0.0), axis=1)
        grad = (grad - tl.sum(grad * matrix, axis=2)[:, :, None]) / total[:, :, None]
        matrix = matrix * total[:, :, None]
        total = tl.sum(tl.where(kept == step, columns, 0.0), axis=1)
        grad = (grad - tl.sum(grad * matrix, axis=1)[:, None, :]) / total[:, None, :]
        matrix = matrix * total[:, None, :]
    return grad


@triton.jit
def _logits_backward(
    streams, grad_read, grad_res, grad_post, strength, static, dynamic, factor, raw, shrink, partial,
    tokens, width, iterations,
    M: tl.constexpr, Q: tl.constexpr, KEPT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    token = program * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    count: tl.constexpr = 2 * M + M * M
    scale = tl.load(factor + token, mask=here, other=0.0)

    side = tl.arange(0, 16)
    side_at, side_in = (side // 8) * M + side % 8, side % 8 < M
    is_post = here[:, None] & (side_in & (side >= 8))[None]
    grad = 2.0 * tl.load(grad_post + token[:, None] * M + side[None] % 8, mask=is_post, other=0.0)
    for branch in tl.static_range(M):
        dots = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = here[:, None] & (column < width)[None]
            x = tl.load(streams + (token[:, None] * M + branch) * width + column[None], mask=inside, other=0.0)
            g = tl.load(grad_read + token[:, None] * width + column[None], mask=inside, other=0.0)
            dots += x.to(tl.float32) * g.to(tl.float32)
        grad += tl.where((side == branch)[None], tl.sum(dots, axis=1)[:, None], 0.0)
    at, inside = token[:, None] * count + side_at[None], here[:, None] & side_in[None]
    moved = tl.load(dynamic + at, mask=inside, other=0.0)
    gain = tl.load(strength + side // 8)[None]
    h = tl.sigmoid(gain * moved + tl.load(static + side_at, mask=side_in, other=0.0)[None])
    grad *= h * (1.0 - h)
    tl.store(raw + at, grad * gain * scale[:, None], mask=inside)
    along = tl.sum(grad * gain * moved, axis=1)
    sums = partial + program * (2 * count)
    tl.store(sums + side_at, tl.sum(grad, axis=0), mask=side_in)
    tl.store(sums + count + side_at, tl.sum(grad * moved, axis=0), mask=side_in)

    row, column = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None]
    cell_at, cell_in = 2 * M + row * M + column, (row < M) & (column < M)
    at, inside = token[:, None, None] * count + cell_at[None], here[:, None, None] & cell_in[None]
    moved = tl.load(dynamic + at, mask=inside, other=0.0)
    gain = tl.load(strength + 2)
    logits = gain * moved + tl.load(static + cell_at, mask=cell_in, other=0.0)[None]
    start = positive(logits, row[None], column[None], M)
    grad = tl.load(grad_res + token[:, None, None] * (M * M) + (row * M + column)[None], mask=inside, other=0.0)
    grad = start * _sinkhorn_backward(grad, start, iterations, KEPT, TOKENS, Q)
    tl.store(raw + at, grad * gain * scale[:, None, None], mask=inside)
    along += tl.sum(tl.sum(grad * gain * moved, axis=2), axis=1)
    tl.store(sums + cell_at, tl.sum(grad, axis=0), mask=cell_in)
    tl.store(sums + count + cell_at, tl.sum(grad * moved, axis=0), mask=cell_in)
    tl.store(shrink + token, along * scale * scale / (M * width), mask=here)


@triton.jit
def _streams_backward(
    streams, grad_read, passed, weight, strength, static, dynamic, raw, shrink, grad_streams, grad_weight,
    tokens, width, chunks, span,
    M: tl.constexpr, COUNT: tl.constexpr, SHORT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    branch = tl.program_id(0) // chunks
    within = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1).to(tl.int64)
    count: tl.constexpr = 2 * M + M * M
    size = M * width
    column = branch * width + within
    key = tl.arange(0, COUNT)
    w = tl.load(
        weight + key[:, None] * size + column[None], mask=(key < count)[:, None] & (within < width)[None], other=0.0
    )
    gain, constant = tl.load(strength), tl.load(static + branch)
    total = tl.zeros([COLUMNS, COUNT], tl.float32)
    for start in range(0, span, TOKENS):
        token = split * span + start + tl.arange(0, TOKENS)
        here = token < tokens
        inside = here[:, None] & (within < width)[None]
        x = tl.load(streams + token[:, None] * size + column[None], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_read + token[:, None] * width + within[None], mask=inside, other=0.0).to(tl.float32)
        r = tl.load(raw + token[:, None] * count + key[None], mask=here[:, None] & (key < count)[None], other=0.0)
        pre = tl.sigmoid(gain * tl.load(dynamic + token * count + branch, mask=here, other=0.0) + constant)
        grad = tl.load(passed + token[:, None] * size + column[None], mask=inside, other=0.0).to(tl.float32)
        grad += pre[:, None] * g - tl.load(shrink + token, mask=here, other=0.0)[:, None] * x
        if SHORT:  # the sum is rounded to bf16, so 10 bits of a fraction are enough
            grad = tl.dot(r, w, grad, input_precision="tf32")
        else:
            grad = tl.dot(r, w, grad, input_precision="tf32x3")
        at = grad_streams + token[:, None] * size + column[None]
        tl.store(at, grad.to(grad_streams.dtype.element_ty), mask=inside)
        total = product(tl.trans(x), r, total, SHORT)
    at = (split * count + key[None]) * size + column[:, None]
    tl.store(grad_weight + at, total, mask=(key < count)[None] & (within < width)[:, None])


@triton.jit
def _write_backward(
    grad, streams, output, h_res, h_post, grad_streams, grad_output, grad_res, grad_post, tokens, width,
    M: tl.constexpr, CELLS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    here = token < tokens
    inside = here[:, None] & (column < width)[None]
    at = token[:, None] * (M * width) + column[None]
    cell = tl.arange(0, CELLS)[None]

    added = tl.load(output + token[:, None] * width + column[None], mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    dots = tl.zeros([TOKENS, CELLS], tl.float32)
    for row in tl.static_range(M):
        g = tl.load(grad + at + row * width, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(h_post + token * M + row, mask=here, other=0.0)[:, None] * g
        dots += tl.where(cell == row, tl.sum(g * added, axis=1)[:, None], 0.0)
    at_output = grad_output + token[:, None] * width + column[None]
    tl.store(at_output, total.to(grad_output.dtype.element_ty), mask=inside)
    tl.store(grad_post + token[:, None] * M + cell, dots, mask=here[:, None] & (cell < M))

    dots = tl.zeros([TOKENS, CELLS], tl.float32)
    for branch in tl.static_range(M):
        x = tl.load(streams + at + branch * width, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for row in tl.static_range(M):
            g = tl.load(grad + at + row * width, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(h_res + token * (M * M) + row * M + branch, mask=here, other=0.0)[:, None] * g
            dots += tl.where(cell == row * M + branch, tl.sum(g * x, axis=1)[:, None], 0.0)
        tl.store(grad_streams + at + branch * width, total.to(grad_streams.dtype.element_ty), mask=inside)
    tl.store(grad_res + token[:, None] * (M * M) + cell, dots, mask=here[:, None] & (cell < M * M))
