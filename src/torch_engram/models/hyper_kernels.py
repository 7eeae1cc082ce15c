"""Hyper-connections in Triton: the twins of ``read_naive`` and ``write_naive`` in :mod:`torch_engram.models.hyper`.

n tokens, M branches, d hidden, K = 2M + M^2 coefficients a token (pre, post, and res row by row). Streams are
contiguous ``[n, M, d]``; coefficients, sums and parameters are fp32. Tokens are int64: n * M * d may pass 2**31.
The backward kernels are in :mod:`torch_engram.models.hyper_backward_kernels`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_READ_TOKENS, _READ_COLUMNS = 32, 64
_WRITE_TOKENS, _WRITE_COLUMNS = 8, 256


def matrix_width(branches: int) -> int:
    """Columns that a kernel gives the mixing matrix: a power of 2, and at least 16 cells for a matrix product."""
    width: int = triton.next_power_of_2(branches)
    return max(4, width)


def read_triton(
    streams: Tensor, weight: Tensor, strength: Tensor, static: Tensor, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the layer reads ``[n, d]``, H_res ``[n, M, M]`` and H_post ``[n, M]``, and what the way back wants.

    That is ``dynamic`` ``[n, K]``, the product of the normed streams with ``weight`` ``[K, M * d]``, and the norm's
    factor ``[n]``. At most 8 branches.
    """
    tokens, branches, width = streams.shape
    assert branches <= 8
    read = streams.new_empty(tokens, width)
    shapes = ((tokens, branches, branches), (tokens, branches), (tokens, len(static)), (tokens,))
    h_res, h_post, dynamic, factor = (streams.new_empty(shape, dtype=torch.float32) for shape in shapes)
    _read[(triton.cdiv(tokens, _READ_TOKENS),)](
        streams, weight, strength, static, read, h_res, h_post, dynamic, factor, tokens, width, eps, iterations,
        M=branches, Q=matrix_width(branches), SHORT=streams.dtype == torch.bfloat16,
        TOKENS=_READ_TOKENS, COLUMNS=_READ_COLUMNS,
    )  # fmt: skip
    return read, h_res, h_post, dynamic, factor


def write_triton(streams: Tensor, output: Tensor, h_res: Tensor, h_post: Tensor) -> Tensor:
    """The branches mixed, with ``output`` ``[n, d]`` spread over them: ``[n, M, d]`` of the streams' type."""
    tokens, branches, width = streams.shape
    written = torch.empty_like(streams)
    grid = (triton.cdiv(tokens, _WRITE_TOKENS), triton.cdiv(width, _WRITE_COLUMNS))
    _write[grid](
        streams, output, h_res, h_post, written, tokens, width,
        M=branches, TOKENS=_WRITE_TOKENS, COLUMNS=_WRITE_COLUMNS,
    )  # fmt: skip
    return written


@triton.jit
def product(exact, other, total, SHORT: tl.constexpr):
    """Adds exact @ other to total, as near as fp32 gives it, on tensor cores that keep 10 bits of a fraction.

    With SHORT, ``exact`` came from bf16 and fits: then ``other`` in two parts is enough.
    """
    if SHORT:
        high = other.to(tl.bfloat16).to(tl.float32)
        total = tl.dot(exact, high, total, input_precision="tf32")
        total = tl.dot(exact, other - high, total, input_precision="tf32")
    else:
        total = tl.dot(exact, other, total, input_precision="tf32x3")
    return total


@triton.jit
def positive(logits, row, column, M: tl.constexpr):
    """exp(logits) up to a factor a token, ``[TOKENS, Q, Q]``; an identity in the rows and columns past M."""
    inside = (row < M) & (column < M)
    top = tl.max(tl.max(tl.where(inside, logits, float("-inf")), axis=2), axis=1)
    return tl.where(inside, tl.exp(logits - top[:, None, None]), tl.where(row == column, 1.0, 0.0))


@triton.jit
def _read(
    streams, weight, strength, static, read, h_res, h_post, dynamic, factor, tokens, width, eps, iterations,
    M: tl.constexpr, Q: tl.constexpr, SHORT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    size = M * width
    count: tl.constexpr = 2 * M + M * M

    # Coefficients stand in two tiles: pre and post, 8 columns each, and the matrix, Q by Q. Their places among K:
    side = tl.arange(0, 16)
    side_at, side_in = (side // 8) * M + side % 8, side % 8 < M
    cell = tl.arange(0, Q * Q)
    cell_at, cell_in = 2 * M + (cell // Q) * M + cell % Q, (cell // Q < M) & (cell % Q < M)

    sides, cells = tl.zeros([TOKENS, 16], tl.float32), tl.zeros([TOKENS, Q * Q], tl.float32)
    square = tl.zeros([TOKENS], tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < size
        at = token[:, None] * size + column[None]
        x = tl.load(streams + at, mask=here[:, None] & inside[None], other=0.0).to(tl.float32)
        square += tl.sum(x * x, axis=1)
        w = tl.load(weight + side_at[None] * size + column[:, None], mask=side_in[None] & inside[:, None], other=0.0)
        sides = product(x, w, sides, SHORT)
        w = tl.load(weight + cell_at[None] * size + column[:, None], mask=cell_in[None] & inside[:, None], other=0.0)
        cells = product(x, w, cells, SHORT)

    # The norm is a factor a token, so it may follow the product.
    scale = 1.0 / tl.sqrt(square / size + eps)
    sides, cells = sides * scale[:, None], cells * scale[:, None]
    tl.store(factor + token, scale, mask=here)
    tl.store(dynamic + token[:, None] * count + side_at[None], sides, mask=here[:, None] & side_in[None])
    tl.store(dynamic + token[:, None] * count + cell_at[None], cells, mask=here[:, None] & cell_in[None])

    sides = tl.load(strength + side // 8)[None] * sides + tl.load(static + side_at, mask=side_in, other=0.0)[None]
    sides = tl.sigmoid(sides)
    is_post = side_in & (side >= 8)
    tl.store(h_post + token[:, None] * M + side[None] % 8, 2.0 * sides, mask=here[:, None] & is_post[None])

    cells = tl.load(strength + 2) * cells + tl.load(static + cell_at, mask=cell_in, other=0.0)[None]
    row, other = tl.arange(0, Q)[None, :, None], tl.arange(0, Q)[None, None, :]
    matrix = positive(tl.reshape(cells, [TOKENS, Q, Q]), row, other, M)
    for _ in range(iterations):
        matrix = matrix / tl.sum(matrix, axis=1)[:, None, :]
        matrix = matrix / tl.sum(matrix, axis=2)[:, :, None]
    tl.store(
        h_res + token[:, None, None] * (M * M) + row * M + other,
        matrix,
        mask=here[:, None, None] & (row < M) & (other < M),
    )

    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = here[:, None] & (column < width)[None]
        mixed = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for branch in tl.static_range(M):
            pre = tl.sum(tl.where((side == branch)[None], sides, 0.0), axis=1)
            at = token[:, None] * size + branch * width + column[None]
            mixed += pre[:, None] * tl.load(streams + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(read + token[:, None] * width + column[None], mixed.to(read.dtype.element_ty), mask=inside)


@triton.jit
def _write(
    streams, output, h_res, h_post, written, tokens, width,
    M: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = token < tokens
    inside = here[:, None] & (column < width)[None]
    added = tl.load(output + token[:, None] * width + column[None], mask=inside, other=0.0).to(tl.float32)
    at = token[:, None] * (M * width) + column[None]
    # A branch is loaded once for every branch that it enters; after the first time it comes from the cache.
    for row in tl.static_range(M):
        total = tl.load(h_post + token * M + row, mask=here, other=0.0)[:, None] * added
        for branch in tl.static_range(M):
            share = tl.load(h_res + token * (M * M) + row * M + branch, mask=here, other=0.0)
            x = tl.load(streams + at + branch * width, mask=inside, other=0.0).to(tl.float32)
            total += share[:, None] * x
        tl.store(written + at + row * width, total.to(written.dtype.element_ty), mask=inside)
