"""Hyper-connections in Triton: the twins of ``read_naive`` and ``write_naive`` in :mod:`torch_engram.models.hyper`.

n tokens, M branches, d hidden, K = 2M + M^2 coefficients a token (pre, post, and res row by row). Streams are
contiguous ``[n, M, d]``; coefficients, sums and parameters are fp32. Tokens are int64: n * M * d may pass 2**31.
To read is a product of streams and weight, in which the norm is a factor that follows; what becomes of a token's
coefficients, a thread each; and a sum of branches. The backward kernels are in
:mod:`torch_engram.models.hyper_backward_kernels`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.models.sinkhorn_kernels import exponentials, sinkhorn

_PRODUCT_TOKENS, _STAGES = 64, 3
"""Tokens of a tile of the product, and how many tiles' loads are under way."""
THREADS = 32
"""Tokens of a program that has a thread for each: one warp, so that their sums are shuffles."""
_READ_NUMBERS, _WRITE_NUMBERS, _COLUMNS = 2048, 1024, 512
"""Most numbers of a branch that a program reads from or writes to, and most of one token's."""


def read_triton(
    streams: Tensor, weight: Tensor, strength: Tensor, static: Tensor, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the layer reads ``[n, d]``, H_res ``[n, M, M]`` and H_post ``[n, M]``, and what the way back wants.

    That is ``dynamic`` ``[n, K]``, the product of the normed streams with ``weight`` ``[K, M * d]``, and the norm's
    factor ``[n]``. At most 8 branches.
    """
    tokens, branches, width = streams.shape
    assert branches <= 8
    count = len(static)
    read = streams.new_empty(tokens, width)
    shapes = ((tokens, branches, branches), (tokens, branches), (tokens, count), (tokens,))
    h_res, h_post, dynamic, factor = (streams.new_empty(shape, dtype=torch.float32) for shape in shapes)
    short = streams.dtype == torch.bfloat16
    high = weight.bfloat16() if short else weight  # in two parts bf16 holds 16 of the 24 bits of an fp32 number
    low = (weight - high).bfloat16() if short else weight
    _coefficients[(triton.cdiv(tokens, _PRODUCT_TOKENS),)](
        streams, high, low, dynamic, factor, tokens, branches * width, eps,
        NATIVE=streams.is_cuda, TOKENS=_PRODUCT_TOKENS, STAGES=_STAGES, num_warps=8, **product_tile(count, short),
    )  # fmt: skip
    _settle[(triton.cdiv(tokens, THREADS),)](
        dynamic, strength, static, h_res, h_post, tokens, iterations, M=branches, TOKENS=THREADS, num_warps=1
    )
    grid, tile = tiles(tokens, width, _READ_NUMBERS)
    _mix[grid](streams, dynamic, strength, static, read, tokens, width, M=branches, **tile)
    return read, h_res, h_post, dynamic, factor


def write_triton(streams: Tensor, output: Tensor, h_res: Tensor, h_post: Tensor) -> Tensor:
    """The branches mixed, with ``output`` ``[n, d]`` spread over them: ``[n, M, d]`` of the streams' type."""
    tokens, branches, width = streams.shape
    written = torch.empty_like(streams)
    grid, tile = tiles(tokens, width, _WRITE_NUMBERS)
    _write[grid](streams, output, h_res, h_post, written, tokens, width, M=branches, **tile)
    return written


def product_tile(count: int, short: bool) -> dict[str, int]:
    """Constants of a product with K coefficients, of bf16 or not. Wider tiles of longer numbers or of more coefficients
    do not fit."""
    padded = max(16, triton.next_power_of_2(count))
    return {"K": count, "COUNT": padded, "SHORT": short, "COLUMNS": 128 if short and padded <= 32 else 64}


def tiles(tokens: int, width: int, numbers: int) -> tuple[tuple[int, int], dict[str, int]]:
    """A grid of tiles of tokens and columns, and their sizes."""
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    rows = numbers // columns
    return (triton.cdiv(tokens, rows), triton.cdiv(width, columns)), {"TOKENS": rows, "COLUMNS": columns}


@triton.jit
def product(left, right, total, NATIVE: tl.constexpr):
    """Adds left @ right of bf16 to total. Triton's interpreter, which is not NATIVE, cannot multiply bf16."""
    if NATIVE:
        total = tl.dot(left, right, total)
    else:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    return total


@triton.jit
def each_branch(streams, token, column, inside, width, M: tl.constexpr):
    """A tuple of each branch's numbers ``[TOKENS, COLUMNS]`` in fp32, zero where not ``inside``."""
    numbers = ()
    for branch in tl.static_range(M):
        at = (token * M + branch)[:, None] * width + column[None]
        numbers = numbers + (tl.load(streams + at, mask=inside, other=0.0).to(tl.float32),)
    return numbers


@triton.jit
def _coefficients(
    streams, high, low, dynamic, factor, tokens, size, eps,
    K: tl.constexpr, COUNT: tl.constexpr, SHORT: tl.constexpr, NATIVE: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The norm's factor of some tokens, and the product of their normed streams and the weight."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    key = tl.arange(0, COUNT)
    total = tl.zeros([TOKENS, COUNT], tl.float32)
    squares = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for first in tl.range(0, size, COLUMNS, num_stages=STAGES):
        column = first + tl.arange(0, COLUMNS)
        exists = column < size
        x = tl.load(streams + token[:, None] * size + column[None], mask=here[:, None] & exists[None], other=0.0)
        at, inside = key[None] * size + column[:, None], (key < K)[None] & exists[:, None]
        w = tl.load(high + at, mask=inside, other=0.0)
        if SHORT:
            total = product(x, w, total, NATIVE)
            total = product(x, tl.load(low + at, mask=inside, other=0.0), total, NATIVE)
        wide = x.to(tl.float32)
        if not SHORT:
            total = tl.dot(wide, w, total, input_precision="tf32x3")
        squares += wide * wide
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / size + eps)
    tl.store(factor + token, scale, mask=here)
    at = dynamic + token[:, None] * K + key[None]
    tl.store(at, total * scale[:, None], mask=here[:, None] & (key < K)[None])


@triton.jit
def _settle(
    dynamic, strength, static, h_res, h_post, tokens, iterations, M: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """H_post and H_res of some tokens."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    moved = dynamic + token * (2 * M + M * M)
    gain = tl.load(strength + 1)
    for branch in tl.static_range(M):
        post = gain * tl.load(moved + M + branch, mask=here, other=0.0) + tl.load(static + M + branch)
        tl.store(h_post + token * M + branch, 2.0 * tl.sigmoid(post), mask=here)
    matrix = exponentials(logits(moved, strength, static, here, M), M)
    matrix = sinkhorn(matrix, iterations, M)
    for cell in tl.static_range(M * M):
        tl.store(h_res + token * (M * M) + cell, matrix[cell], mask=here)


@triton.jit
def logits(moved, strength, static, here, M: tl.constexpr):
    """Logarithms of what Sinkhorn's iterations balance, a tuple of M * M, from tokens' coefficients at ``moved``."""
    gain = tl.load(strength + 2)
    cells = ()
    for cell in tl.static_range(M * M):
        dynamic = tl.load(moved + 2 * M + cell, mask=here, other=0.0)
        cells = cells + (gain * dynamic + tl.load(static + 2 * M + cell),)
    return cells


@triton.jit
def _mix(
    streams, dynamic, strength, static, read, tokens, width,
    M: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What the layer reads: branches by H_pre."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = token < tokens
    inside = here[:, None] & (column < width)[None]
    x = each_branch(streams, token, column, inside, width, M)
    gain = tl.load(strength)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for branch in tl.static_range(M):
        moved = tl.load(dynamic + token * (2 * M + M * M) + branch, mask=here, other=0.0)
        total += tl.sigmoid(gain * moved + tl.load(static + branch))[:, None] * x[branch]
    tl.store(read + token[:, None] * width + column[None], total.to(read.dtype.element_ty), mask=inside)


@triton.jit
def _write(
    streams, output, h_res, h_post, written, tokens, width,
    M: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Branches by H_res, and the layer's output by H_post."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = token < tokens
    inside = here[:, None] & (column < width)[None]
    x = each_branch(streams, token, column, inside, width, M)
    added = tl.load(output + token[:, None] * width + column[None], mask=inside, other=0.0).to(tl.float32)
    for row in tl.static_range(M):
        total = tl.load(h_post + token * M + row, mask=here, other=0.0)[:, None] * added
        for branch in tl.static_range(M):
            total += tl.load(h_res + (token * M + row) * M + branch, mask=here, other=0.0)[:, None] * x[branch]
        at = written + (token * M + row)[:, None] * width + column[None]
        tl.store(at, total.to(written.dtype.element_ty), mask=inside)
