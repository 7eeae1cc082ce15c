"""Embeddings that were expanded ahead of their step, done again on a GPU where they read rows that changed since.

A CPU expands all of them again, which is faster there than looking for the places. Offsets are int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 128
_TILE = 2048
"""Numbers that one program may copy."""


def expand_changed_naive(values: Tensor, inverse: Tensor, kept: Tensor | None, changed: Tensor, out: Tensor) -> Tensor:
    """Write the rows that ``changed`` bool ``[U]`` marks to the places in ``out`` that read them; returns ``out``.

    ``values``: fp32 ``[U, dim]``. ``inverse``: int64 ``[n]``, each read's row; ``c`` reads a position. ``kept``: int64
    ``[n / c]``, the positions that read, None for all. ``out``: ``[positions, c·dim]``. Rows of ``values`` and of
    ``out`` may be any distance apart, numbers of a row lie side by side.
    """
    columns = out.shape[1] // values.shape[1]
    read = changed[inverse].nonzero().squeeze(1)
    position = read // columns if kept is None else kept[read // columns]
    out.unflatten(1, (columns, values.shape[1]))[position, read % columns] = values[inverse[read]].to(out.dtype)
    return out


def expand_changed_triton(values: Tensor, inverse: Tensor, kept: Tensor | None, changed: Tensor, out: Tensor) -> Tensor:
    """As :func:`expand_changed_naive`, without waiting for the host."""
    reads, dim = len(inverse), values.shape[1]
    if not reads:
        return out
    columns = min(_COLUMNS, triton.next_power_of_2(dim))
    grid = triton.cdiv(reads, _TILE // columns), triton.cdiv(dim, columns)
    _expand_changed[grid](
        values, inverse, inverse if kept is None else kept, changed.view(torch.uint8), out,
        reads, out.shape[1] // dim, dim, values.stride(0), out.stride(0),
        KEPT=kept is not None, READS=_TILE // columns, COLUMNS=columns,
    )  # fmt: skip
    return out


@triton.jit
def _expand_changed(
    values, inverse, kept, changed, out, reads, per_position, dim, value_stride, out_stride,
    KEPT: tl.constexpr, READS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    read = tl.program_id(0).to(tl.int64) * READS + tl.arange(0, READS)
    row = tl.load(inverse + read, mask=read < reads, other=0)
    hit = (read < reads) & (tl.load(changed + row, mask=read < reads, other=0) != 0)
    if tl.sum(hit.to(tl.int32), axis=0) > 0:
        position = read // per_position
        if KEPT:
            position = tl.load(kept + position, mask=hit, other=0)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = hit[:, None] & (column < dim)[None]
        place = position * out_stride + read % per_position * dim
        value = tl.load(values + row[:, None] * value_stride + column[None], mask=inside, other=0.0)
        tl.store(out + place[:, None] + column[None], value.to(out.dtype.element_ty), mask=inside)
