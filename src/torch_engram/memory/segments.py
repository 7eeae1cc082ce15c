"""Unique rows of a step, their expansion to positions, and the merge of gradients back: the index work of a lookup.

``unique_rows``, ``expand`` and ``merge`` choose by device: PyTorch here on a CPU, the Triton kernels of
:mod:`torch_engram.memory.segment_kernels` on a GPU. ``merge_naive`` reads like the definition; the others give the same
sums, each row's reads added in one fixed order, so that the bits never depend on threads or luck.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_engram.kernels import use_kernels


@dataclass(frozen=True)
class Segments:
    """Which of U rows each of n reads wants, and the reads sorted by row."""

    inverse: Tensor
    """int64 ``[n]``: the row, among U, of every read."""
    order: Tensor
    """int64 ``[n]``: the reads sorted by row, reads of one row in their own order."""
    starts: Tensor
    """int64 ``[U]``: where each row's reads begin in ``order``; rows that nobody reads have none."""

    @classmethod
    def of(cls, inverse: Tensor, rows: int) -> Segments:
        """Segments of ``inverse`` over ``rows`` rows."""
        ordered, order = inverse.sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(rows, device=inverse.device))
        return cls(inverse, order, starts)


def unique_rows(ids: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Segments]:
    """Distinct ids ascending ``[U]``, the read ``[U]`` where each was first met, and the segments; one stable sort.

    ``ids``: int64 ``[n]``. ``rows``: all ids are from 0 to below it, where given; a GPU sorts narrower keys then.
    """
    if use_kernels(ids) and len(ids):
        from torch_engram.memory.segment_kernels import unique_triton

        distinct, first, *segments = unique_triton(ids, rows)
        return distinct, first, Segments(*segments)
    ordered, order = ids.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    starts = new.nonzero().squeeze(1)
    inverse = torch.empty_like(order)
    inverse[order] = new.cumsum(0) - 1
    return ordered[starts], order[starts], Segments(inverse, order, starts)


def expand(values: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """Row values ``[U, dim]`` to one row a read, in ``out`` ``[n, dim]`` and rounded to its type; returns ``out``.

    Rows of ``values`` may be any distance apart, as in a view of encoded records.
    """
    if use_kernels(values):
        from torch_engram.memory.segment_kernels import expand_triton

        return expand_triton(values, inverse, out)
    return torch.index_select(values.to(out.dtype), 0, inverse, out=out)


def merge_naive(grads: Tensor, segments: Segments) -> Tensor:
    """Gradients of reads ``[n, dim]`` to gradients of rows fp32 ``[U, dim]``: the sum over each row's reads."""
    total = torch.zeros(len(segments.starts), grads.shape[1], device=grads.device)
    return total.index_add_(0, segments.inverse, grads.float())


def merge(grads: Tensor, segments: Segments, out: Tensor | None = None, *, adds: bool = False) -> Tensor:
    """Equal to :func:`merge_naive`, and deterministic. In ``out``, fp32 ``[U, dim]``, where given, or added to it.

    Rows of ``grads`` may be any distance apart.
    """
    if use_kernels(grads):
        from torch_engram.memory.segment_kernels import merge_triton

        if out is None:
            out = torch.empty(len(segments.starts), grads.shape[1], device=grads.device)
        side_by_side = grads if grads.stride(1) == 1 else grads.contiguous()  # those of a plain sum() all share a place
        return merge_triton(side_by_side, segments.inverse, segments.order, segments.starts, out, adds)
    merged = F.embedding_bag(segments.order, grads.float(), segments.starts, mode="sum")  # a bag of reads for every row
    if out is None:
        return merged
    return out.add_(merged) if adds else out.copy_(merged)
