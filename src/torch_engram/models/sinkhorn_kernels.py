"""Sinkhorn's iterations for a small matrix a token and their way back, in Triton: a thread has a token's whole matrix.

A matrix A is a tuple of M * M tiles of tokens, row by row. To divide columns and rows by their sums, in turn, is to
multiply each by a factor: the result is r_i * A_ij * c_j, and what is iterated are 2M factors and not a matrix,
c_j = 1 / sum over i of A_ij * r_i, then r_i = 1 / sum over j of A_ij * c_j. Products are taken in an order in which
none leaves fp32's range unless a row of A lies a factor of e**87 below the largest numbers of its columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponentials(logits, M: tl.constexpr):
    """exp(logits) up to a factor a column, by which Sinkhorn's iterations divide first of all: the largest is 1."""
    tops = ()
    for j in tl.static_range(M):
        top = logits[j]
        for i in tl.static_range(1, M):
            top = tl.maximum(top, logits[i * M + j])
        tops = tops + (top,)
    matrix = ()
    for i in tl.static_range(M):
        for j in tl.static_range(M):
            matrix = matrix + (tl.exp(logits[i * M + j] - tops[j]),)
    return matrix


@triton.jit
def full(like, value, M: tl.constexpr):
    """M tiles of a value."""
    tiles = ()
    for _ in tl.static_range(M):
        tiles = tiles + (tl.full(like.shape, value, tl.float32),)
    return tiles


@triton.jit
def column_sums(matrix, rows, M: tl.constexpr):
    """Sum over i of A_ij * rows_i, for every column j."""
    sums = ()
    for j in tl.static_range(M):
        total = matrix[j] * rows[0]
        for i in tl.static_range(1, M):
            total += matrix[i * M + j] * rows[i]
        sums = sums + (total,)
    return sums


@triton.jit
def row_sums(matrix, columns, M: tl.constexpr):
    """Sum over j of A_ij * columns_j, for every row i."""
    sums = ()
    for i in tl.static_range(M):
        total = matrix[i * M] * columns[0]
        for j in tl.static_range(1, M):
            total += matrix[i * M + j] * columns[j]
        sums = sums + (total,)
    return sums


@triton.jit
def inverse(tiles, M: tl.constexpr):
    """1 over each."""
    results = ()
    for i in tl.static_range(M):
        results = results + (1.0 / tiles[i],)
    return results


@triton.jit
def inverse_slopes(grads, inverses, M: tl.constexpr):
    """Gradients of what ``inverses`` are 1 over."""
    results = ()
    for i in tl.static_range(M):
        results = results + (-(grads[i] * inverses[i]) * inverses[i],)
    return results


@triton.jit
def between(matrix, rows, columns, M: tl.constexpr):
    """rows_i * A_ij * columns_j."""
    result = ()
    for i in tl.static_range(M):
        for j in tl.static_range(M):
            result = result + (matrix[i * M + j] * columns[j] * rows[i],)
    return result


@triton.jit
def plus_outer(matrix, rows, columns, M: tl.constexpr):
    """A_ij + rows_i * columns_j."""
    result = ()
    for i in tl.static_range(M):
        for j in tl.static_range(M):
            result = result + (matrix[i * M + j] + rows[i] * columns[j],)
    return result


@triton.jit
def products(left, right, COUNT: tl.constexpr):
    """Tile times tile."""
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (left[i] * right[i],)
    return result


@triton.jit
def sums(left, right, COUNT: tl.constexpr):
    """Tile plus tile."""
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (left[i] + right[i],)
    return result


@triton.jit
def sinkhorn(matrix, iterations, M: tl.constexpr):
    """The matrix with columns and rows divided by their sums so many times."""
    rows, columns = full(matrix[0], 1.0, M), full(matrix[0], 1.0, M)
    for _ in range(iterations):
        columns = inverse(column_sums(matrix, rows, M), M)
        rows = inverse(row_sums(matrix, columns, M), M)
    return between(matrix, rows, columns, M)


@triton.jit
def sinkhorn_backward(matrix, grad, kept, token, here, tokens, iterations, M: tl.constexpr):
    """The gradient of A's logarithms from that of the result. ``kept`` is room for the factors before and after every
    half of an iteration, fp32 ``[2 * iterations + 1, M, n]``."""
    rows, columns = full(matrix[0], 1.0, M), full(matrix[0], 1.0, M)
    keep(rows, kept, 0, token, here, tokens, M)
    for step in range(iterations):
        columns = inverse(column_sums(matrix, rows, M), M)
        rows = inverse(row_sums(matrix, columns, M), M)
        keep(columns, kept, 2 * step + 1, token, here, tokens, M)
        keep(rows, kept, 2 * step + 2, token, here, tokens, M)
    tl.debug_barrier()  # whichever thread reads them again
    through = between(grad, rows, columns, M)
    moved = products(grad, matrix, M * M)
    grad_rows, grad_columns = row_sums(moved, columns, M), column_sums(moved, rows, M)
    for back in range(iterations):
        half = 2 * (iterations - 1 - back)
        columns = factors(kept, half + 1, token, here, tokens, M)
        slopes = inverse_slopes(grad_rows, factors(kept, half + 2, token, here, tokens, M), M)
        through = plus_outer(through, slopes, columns, M)
        slopes = inverse_slopes(sums(grad_columns, column_sums(matrix, slopes, M), M), columns, M)
        through = plus_outer(through, factors(kept, half, token, here, tokens, M), slopes, M)
        grad_rows, grad_columns = row_sums(matrix, slopes, M), full(matrix[0], 0.0, M)
    return products(matrix, through, M * M)


@triton.jit
def keep(tiles, kept, half, token, here, tokens, M: tl.constexpr):
    """Stores the factors after so many halves of an iteration."""
    for i in tl.static_range(M):
        tl.store(kept + (half * M + i) * tokens + token, tiles[i], mask=here)


@triton.jit
def factors(kept, half, token, here, tokens, M: tl.constexpr):
    """What :func:`keep` stored; ones where no token is."""
    tiles = ()
    for i in tl.static_range(M):
        tiles = tiles + (tl.load(kept + (half * M + i) * tokens + token, mask=here, other=1.0),)
    return tiles
