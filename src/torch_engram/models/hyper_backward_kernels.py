"""The way back through hyper-connections in Triton; shapes and types as in :mod:`torch_engram.models.hyper_kernels`.

No program adds to what another one writes: gradients of parameters are sums of partial sums in a fixed order. ``raw``
``[n, K]`` is the gradient of the product of streams and weight, and ``shrink`` ``[n]`` what the streams lose through
their norm, by which they are multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.models.hyper_kernels import THREADS, each_branch, logits, product, product_tile
from torch_engram.models.sinkhorn_kernels import exponentials, sinkhorn_backward

_TOKENS, _STAGES = 64, 2
"""Tokens of a tile whose streams' gradient is a product, and how many tiles' loads are under way."""
_SPLITS = 32
"""Parts of the tokens, each with a part of the weight's gradient."""
_ROWS, _CHUNK = 4, 256
"""Tokens of a program that sums over their columns, a warp each, and columns at a time of four branches."""
LANES = tl.constexpr(32)


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
    count, programs = len(static), triton.cdiv(tokens, THREADS)
    shapes = (
        (tokens, branches),
        (tokens, count),
        (tokens,),
        (programs, 2, count),
        (2 * iterations + 1, branches, tokens),
    )
    grad_pre, raw, shrink, partial, kept = (streams.new_empty(shape, dtype=torch.float32) for shape in shapes)
    _dots[(triton.cdiv(tokens, _ROWS),)](streams, grads[0], grad_pre, tokens, width, **_rows(branches, width))
    _logits_backward[(programs,)](
        grad_pre, *grads[1:3], strength, static, *saved, kept, raw, shrink, partial, tokens, width, iterations,
        M=branches, TOKENS=THREADS, num_warps=1,
    )  # fmt: skip
    tile = product_tile(count, streams.dtype == torch.bfloat16)
    fits = tile["SHORT"] or tile["COUNT"] <= 32  # as two tiles of fp32 and many coefficients do not, on most GPUs
    rows, stages = (_TOKENS, _STAGES) if fits else (_TOKENS // 2, 1)
    splits = min(_SPLITS, triton.cdiv(tokens, rows))
    span = triton.cdiv(triton.cdiv(tokens, splits), rows) * rows
    grad_streams = torch.empty_like(streams)
    grad_weight = weight.new_empty(splits, *weight.shape)
    _streams_backward[(branches * triton.cdiv(width, tile["COLUMNS"]), splits)](
        streams, grads[0], grads[3], weight, strength, static, saved[0], raw, shrink, grad_streams, grad_weight,
        tokens, width, span, M=branches, NATIVE=streams.is_cuda, TOKENS=rows, STAGES=stages, num_warps=8, **tile,
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
    _write_backward[(triton.cdiv(tokens, _ROWS),)](
        grad, streams, output, h_res, h_post, *grads, tokens, width, **_rows(branches, width)
    )
    return grads[0], grads[1], grads[2], grads[3]


def _rows(branches: int, width: int) -> dict[str, Any]:
    """Constants of a kernel that sums over columns: registers hold a chunk of every branch."""
    chunk = min(_CHUNK if branches <= 4 else _CHUNK // 2, max(32, triton.next_power_of_2(width)))
    return {"M": branches, "TOKENS": _ROWS, "COLUMNS": chunk, "num_warps": _ROWS}


@triton.jit
def by_lane(numbers):
    """Sums ``[TOKENS, LANES]`` of what the lanes of a warp hold of a tile: to add them up takes no shuffle."""
    return tl.sum(tl.reshape(numbers, [numbers.shape[0], LANES, numbers.shape[1] // LANES]), axis=2)


@triton.jit
def nothing(COUNT: tl.constexpr, TOKENS: tl.constexpr):
    """A tuple of sums by lane, of nothing yet."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([TOKENS, LANES], tl.float32),)
    return sums


@triton.jit
def plus_dots(sums, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Sums by lane with the products of every tile of ``left`` and every tile of ``right``."""
    more = ()
    for i in tl.static_range(LEFT):
        for j in tl.static_range(RIGHT):
            more = more + (sums[i * RIGHT + j] + by_lane(left[i] * right[j]),)
    return more


@triton.jit
def store_sums(at, sums, here, COUNT: tl.constexpr):
    """Stores sums by lane, added up, side by side."""
    for i in tl.static_range(COUNT):
        tl.store(at + i, tl.sum(sums[i], axis=1), mask=here)


@triton.jit
def _dots(streams, grad_read, grad_pre, tokens, width, M: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """The gradient of H_pre: sums over columns of each branch times the gradient of what the layer read."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    sums = nothing(M, TOKENS)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = here[:, None] & (column < width)[None]
        x = each_branch(streams, token, column, inside, width, M)
        g = each_branch(grad_read, token, column, inside, width, 1)
        sums = plus_dots(sums, x, g, M, 1)
    store_sums(grad_pre + token * M, sums, here, M)


@triton.jit
def _logits_backward(
    grad_pre, grad_res, grad_post, strength, static, dynamic, factor, kept, raw, shrink, partial,
    tokens, width, iterations, M: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """``raw`` and ``shrink`` of some tokens, and ``[programs, 2, K]`` of the gradients of static and strength."""
    K: tl.constexpr = 2 * M + M * M
    tokens = tl.cast(tokens, tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    scale = tl.load(factor + token, mask=here, other=0.0)
    moved, raw = dynamic + token * K, raw + token * K
    sums = partial + tl.program_id(0).to(tl.int64) * (2 * K)
    along = tl.zeros([TOKENS], tl.float32)
    for place in tl.static_range(2 * M):
        if place < M:
            grad = tl.load(grad_pre + token * M + place, mask=here, other=0.0)
        else:
            grad = 2.0 * tl.load(grad_post + token * M + (place - M), mask=here, other=0.0)
        gain, x = tl.load(strength + place // M), tl.load(moved + place, mask=here, other=0.0)
        h = tl.sigmoid(gain * x + tl.load(static + place))
        along += pass_on(grad * h * (1.0 - h), x, gain, scale, raw + place, sums + place, here, K)

    grads = ()
    for cell in tl.static_range(M * M):
        grads = grads + (tl.load(grad_res + token * (M * M) + cell, mask=here, other=0.0),)
    matrix = exponentials(logits(moved, strength, static, here, M), M)
    grads = sinkhorn_backward(matrix, grads, kept, token, here, tokens, iterations, M)
    gain = tl.load(strength + 2)
    for cell in tl.static_range(M * M):
        x = tl.load(moved + 2 * M + cell, mask=here, other=0.0)
        along += pass_on(grads[cell], x, gain, scale, raw + 2 * M + cell, sums + 2 * M + cell, here, K)
    tl.store(shrink + token, along * scale * scale / (M * width), mask=here)


@triton.jit
def pass_on(grad, x, gain, scale, raw, sums, here, K: tl.constexpr):
    """From the gradient of gain * x + constant: stores that of the product that x is and the sums for constant and
    gain, and gives back what the product's norm gets of it."""
    tl.store(raw, grad * gain * scale, mask=here)
    tl.store(sums, tl.sum(grad, axis=0))
    tl.store(sums + K, tl.sum(grad * x, axis=0))
    return grad * gain * x


@triton.jit
def _streams_backward(
    streams, grad_read, passed, weight, strength, static, dynamic, raw, shrink, grad_streams, grad_weight,
    tokens, width, span, M: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr, SHORT: tl.constexpr,
    NATIVE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of some columns of one branch for a part of the tokens, and that part's gradient of their weight."""
    branch = tl.program_id(0) % M  # branches side by side: the gradient of what the layer read comes from the cache
    within = tl.program_id(0) // M * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1).to(tl.int64)
    size = M * width
    column, exists = branch * width + within, within < width
    key = tl.arange(0, COUNT)
    w = tl.load(weight + key[:, None] * size + column[None], mask=(key < K)[:, None] & exists[None], other=0.0)
    w_high = w.to(tl.bfloat16)
    w_low = (w - w_high.to(tl.float32)).to(tl.bfloat16)
    gain, constant = tl.load(strength), tl.load(static + branch)
    total = tl.zeros([COLUMNS, COUNT], tl.float32)
    for first in tl.range(0, span, TOKENS, num_stages=STAGES):
        token = split * span + first + tl.arange(0, TOKENS)
        here = token < tokens
        inside = here[:, None] & exists[None]
        x = tl.load(streams + token[:, None] * size + column[None], mask=inside, other=0.0)
        g = tl.load(grad_read + token[:, None] * width + within[None], mask=inside, other=0.0).to(tl.float32)
        r = tl.load(raw + token[:, None] * K + key[None], mask=here[:, None] & (key < K)[None], other=0.0)
        pre = tl.sigmoid(gain * tl.load(dynamic + token * K + branch, mask=here, other=0.0) + constant)
        grad = tl.load(passed + token[:, None] * size + column[None], mask=inside, other=0.0).to(tl.float32)
        grad += pre[:, None] * g - tl.load(shrink + token, mask=here, other=0.0)[:, None] * x.to(tl.float32)
        if SHORT:  # each fp32 number as the sum of two in bf16
            r_high = r.to(tl.bfloat16)
            r_low = (r - r_high.to(tl.float32)).to(tl.bfloat16)
            grad = product(r_high, w_high, grad, NATIVE)
            grad = product(r_low, w_high, grad, NATIVE)
            grad = product(r_high, w_low, grad, NATIVE)
            total = product(tl.trans(x), r_high, total, NATIVE)
            total = product(tl.trans(x), r_low, total, NATIVE)
        else:
            grad = tl.dot(r, w, grad, input_precision="tf32x3")
            total = tl.dot(tl.trans(x.to(tl.float32)), r, total, input_precision="tf32x3")
        at = grad_streams + token[:, None] * size + column[None]
        tl.store(at, grad.to(grad_streams.dtype.element_ty), mask=inside)
    at = (split * K + key[None]) * size + column[:, None]
    tl.store(grad_weight + at, total, mask=(key < K)[None] & exists[:, None])


@triton.jit
def _write_backward(
    grad, streams, output, h_res, h_post, grad_streams, grad_output, grad_res, grad_post, tokens, width,
    M: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of some tokens' streams, output and coefficients."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    of_res, of_post = nothing(M * M, TOKENS), nothing(M, TOKENS)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = here[:, None] & (column < width)[None]
        g = each_branch(grad, token, column, inside, width, M)
        x = each_branch(streams, token, column, inside, width, M)
        added = each_branch(output, token, column, inside, width, 1)
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for row in tl.static_range(M):
            total += tl.load(h_post + token * M + row, mask=here, other=0.0)[:, None] * g[row]
        at = grad_output + token[:, None] * width + column[None]
        tl.store(at, total.to(grad_output.dtype.element_ty), mask=inside)
        for branch in tl.static_range(M):
            total = tl.zeros([TOKENS, COLUMNS], tl.float32)
            for row in tl.static_range(M):
                total += tl.load(h_res + (token * M + row) * M + branch, mask=here, other=0.0)[:, None] * g[row]
            at = grad_streams + (token * M + branch)[:, None] * width + column[None]
            tl.store(at, total.to(grad_streams.dtype.element_ty), mask=inside)
        of_res, of_post = plus_dots(of_res, g, x, M, M), plus_dots(of_post, g, added, M, 1)
    store_sums(grad_res + token * (M * M), of_res, here, M * M)
    store_sums(grad_post + token * M, of_post, here, M)
