"""Expansion and merge on a GPU: the Triton twins of :mod:`torch_engram.memory.segments`.

Positions and offsets are int64: a step's gradients may have more than 2**31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_READS_AHEAD = 32
"""Gradients of one row that are loaded together."""
_READS_A_PROGRAM = 16


def expand_triton(values: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """As :func:`~torch_engram.memory.segments.expand`; rounds to ``out``'s type on the way, ``[n, dim]`` contiguous."""
    reads, dim = out.shape
    if not reads:
        return out
    grid = (triton.cdiv(reads, _READS_A_PROGRAM),)
    _expand[grid](values, inverse, out, reads, dim, READS=_READS_A_PROGRAM, DIM=triton.next_power_of_2(dim))
    return out


def merge_triton(grads: Tensor, order: Tensor, starts: Tensor, out: Tensor) -> Tensor:
    """As :func:`~torch_engram.memory.segments.merge_naive`, from contiguous gradients ``[n, dim]`` of any type.

    One program sums one row in a fixed order, so the bits are the same from run to run.
    """
    rows, dim = out.shape
    if not rows:
        return out
    _merge[(rows,)](
        grads, order, starts, out, len(order), rows, dim, READS=_READS_AHEAD, DIM=triton.next_power_of_2(dim)
    )
    return out


@triton.jit
def _expand(values, inverse, out, reads, dim, READS: tl.constexpr, DIM: tl.constexpr):
    read = tl.program_id(0).to(tl.int64) * READS + tl.arange(0, READS)
    column = tl.arange(0, DIM)
    row = tl.load(inverse + read, mask=read < reads, other=0)
    inside = (read < reads)[:, None] & (column < dim)[None]
    value = tl.load(values + row[:, None] * dim + column[None], mask=inside)
    tl.store(out + read[:, None] * dim + column[None], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _merge(grads, order, starts, out, reads, rows, dim, READS: tl.constexpr, DIM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DIM)
    place = tl.load(starts + row)
    end = tl.load(starts + row + 1, mask=row + 1 < rows, other=reads)
    total = tl.zeros([DIM], tl.float32)
    while place < end:
        at = place + tl.arange(0, READS)
        read = tl.load(order + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (column < dim)[None]
        part = tl.load(grads + read[:, None] * dim + column[None], mask=inside, other=0.0)
        total += tl.sum(part.to(tl.float32), axis=0)
        place += READS
    tl.store(out + row * dim + column, total, mask=column < dim)
