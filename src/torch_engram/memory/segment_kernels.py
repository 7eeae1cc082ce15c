"""Unique rows, expansion and merge on a GPU: the Triton twins of :mod:`torch_engram.memory.segments`.

Positions and offsets are int64: a step's gradients may have more than 2**31 elements. Every kernel works on tiles of a
few rows and at most ``_COLUMNS`` columns, so that a thread's accesses are 16 bytes wide where rows are aligned to it.

``merge`` sums rows of very unequal length: most have one or two reads, and the most-read one of natural text has every
fortieth. The reads, sorted by row, are therefore cut every ``_PIECE`` places. A row's reads before the first cut are
its head, and the heads of several rows are summed side by side, which keeps all lanes at work where rows are short.
What a cut separates from its row is a piece; pieces are summed on their own, and added to their row's head in their
order. Cuts depend on nothing but the reads, so the bits are the same from run to run, and nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 128
_EXPANDED = 2048
"""Numbers that one program of ``expand`` copies."""
_HEADS = 1024
"""Numbers of the sums that one program of ``merge`` has in hand: 8 a thread, one 16-byte access in bf16."""
_READS_AHEAD = 4
"""Reads of one row that are on their way together."""
_PIECE = 64
_PIECES_AHEAD = 64
_IDS = 1024
"""Ids that one program of ``unique`` looks at."""


def unique_triton(ids: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`~torch_engram.memory.segments.unique_rows`, for one id or more.

    Returns distinct ids ``[U]``, the read ``[U]`` where each was first met, and the segments' inverse, order, starts.
    """
    narrow = rows is not None and rows <= 2**31  # a radix sort takes half as many passes over half as wide keys
    ordered, order = (ids.to(torch.int32) if narrow else ids).sort(stable=True)
    blocks = triton.cdiv(len(ids), _IDS)
    new = torch.empty(blocks, dtype=torch.int64, device=ids.device)
    _count_new[(blocks,)](ordered, new, len(ids), IDS=_IDS)
    upto = new.cumsum(0)
    found = int(upto[-1])  # the one time that the host waits for the device
    distinct, first, starts = (torch.empty(found, dtype=torch.int64, device=ids.device) for _ in range(3))
    inverse = torch.empty_like(order)
    _place_new[(blocks,)](ordered, order, new, upto, distinct, first, starts, inverse, len(ids), IDS=_IDS)
    return distinct, first, inverse, order, starts


def expand_triton(values: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """As :func:`~torch_engram.memory.segments.expand`; rounds to ``out``'s type on the way, ``[n, dim]`` contiguous.

    ``values``: any distance between rows, numbers of a row side by side.
    """
    reads, dim = out.shape
    assert dim == 1 or values.stride(1) == 1
    if not reads:
        return out
    columns = _columns(dim)
    tile = _EXPANDED // columns
    grid = triton.cdiv(reads, tile), triton.cdiv(dim, columns)
    _expand[grid](values, inverse, out, reads, dim, values.stride(0), READS=tile, COLUMNS=columns)
    return out


def merge_triton(
    grads: Tensor, inverse: Tensor, order: Tensor, starts: Tensor, out: Tensor, adds: bool = False
) -> Tensor:
    """As :func:`~torch_engram.memory.segments.merge`, from gradients ``[n, dim]`` of any type, in ``out``, fp32
    ``[U, dim]`` contiguous.

    ``grads``: any distance between rows, numbers of a row side by side. ``adds``: to what is in ``out``, of which rows
    that nobody reads are then left alone.
    """
    rows, dim = out.shape
    assert dim == 1 or grads.stride(1) == 1
    reads, stride, columns = len(order), grads.stride(0), _columns(dim)
    across, tile = triton.cdiv(dim, columns), _HEADS // columns
    if rows:
        _sum_heads[triton.cdiv(rows, tile), across](
            grads, order, starts, out, reads, rows, dim, stride,
            PIECE=_PIECE, ROWS=tile, AHEAD=_READS_AHEAD, COLUMNS=columns, ADDS=adds,
        )  # fmt: skip
    cuts = (reads - 1) // _PIECE
    if cuts > 0:
        pieces = torch.empty(cuts, dim, device=out.device)
        _sum_pieces[cuts, across](
            grads, inverse, order, starts, pieces, reads, rows, dim, stride, PIECE=_PIECE, COLUMNS=columns
        )
        _add_pieces[cuts, across](
            pieces, inverse, order, starts, out, reads, rows, dim, PIECE=_PIECE, AHEAD=_PIECES_AHEAD, COLUMNS=columns
        )
    return out


def _columns(dim: int) -> int:
    columns: int = min(_COLUMNS, triton.next_power_of_2(dim))
    return columns


@triton.jit
def _new_ids(ordered, at, count):
    """Sorted ids at some places, and whether each differs from the one before it."""
    ids = tl.load(ordered + at, mask=at < count, other=0)
    before = tl.load(ordered + at - 1, mask=(at > 0) & (at < count), other=0)
    return ids, ((ids != before) | (at == 0)) & (at < count)


@triton.jit
def _count_new(ordered, new, count, IDS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    _, is_new = _new_ids(ordered, block * IDS + tl.arange(0, IDS), count)
    tl.store(new + block, tl.sum(is_new.to(tl.int64), axis=0))


@triton.jit
def _place_new(ordered, order, new, upto, distinct, first, starts, inverse, count, IDS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * IDS + tl.arange(0, IDS)
    ids, is_new = _new_ids(ordered, at, count)
    before = tl.load(upto + block) - tl.load(new + block)
    row = before + tl.cumsum(is_new.to(tl.int64), axis=0) - 1
    read = tl.load(order + at, mask=at < count, other=0)
    tl.store(inverse + read, row, mask=at < count)
    tl.store(distinct + row, ids.to(tl.int64), mask=is_new)
    tl.store(first + row, read, mask=is_new)
    tl.store(starts + row, at, mask=is_new)


@triton.jit
def _expand(values, inverse, out, reads, dim, stride, READS: tl.constexpr, COLUMNS: tl.constexpr):
    read = tl.program_id(0).to(tl.int64) * READS + tl.arange(0, READS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(inverse + read, mask=read < reads, other=0)
    inside = (read < reads)[:, None] & (column < dim)[None]
    value = tl.load(values + row[:, None] * stride + column[None], mask=inside)
    tl.store(out + read[:, None] * dim + column[None], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_reads(grads, order, at, end, column, dim, stride):
    """The gradients, fp32, of the reads at some places of the order; zero from ``end`` on."""
    read = tl.load(order + at, mask=at < end, other=0)
    inside = (at < end)[:, None] & (column < dim)[None]
    return tl.load(grads + read[:, None] * stride + column[None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sum_heads(
    grads, order, starts, out, reads, rows, dim, stride,
    PIECE: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr, COLUMNS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """Each row's sum up to the first cut."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.load(starts + row, mask=row < rows, other=reads)
    end = tl.load(starts + row + 1, mask=row + 1 < rows, other=reads)
    end = tl.minimum(end, (at // PIECE + 1) * PIECE)
    left = tl.max(end - at, axis=0)
    inside = (row < rows)[:, None] & (column < dim)[None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if ADDS:
        inside = inside & (at < end)[:, None]
        total += tl.load(out + row[:, None] * dim + column[None], mask=inside, other=0.0)
    while left > 0:
        for ahead in tl.static_range(AHEAD):
            total += _load_reads(grads, order, at + ahead, end, column, dim, stride)
        at += AHEAD
        left -= AHEAD
    tl.store(out + row[:, None] * dim + column[None], total, mask=inside)


@triton.jit
def _row_at(inverse, order, starts, place, reads, rows):
    """The row whose reads are at ``place``, and where they begin and end."""
    row = tl.load(inverse + tl.load(order + place))
    return row, tl.load(starts + row), tl.load(starts + row + 1, mask=row + 1 < rows, other=reads)


@triton.jit
def _sum_pieces(
    grads, inverse, order, starts, pieces, reads, rows, dim, stride, PIECE: tl.constexpr, COLUMNS: tl.constexpr
):
    """What follows each cut of a row, up to the next cut or the row's end."""
    piece = tl.program_id(0).to(tl.int64)
    cut = (piece + 1) * PIECE
    _, begin, end = _row_at(inverse, order, starts, cut, reads, rows)
    if begin < cut:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        at = cut + tl.arange(0, PIECE)
        total = tl.sum(_load_reads(grads, order, at, end, column, dim, stride), axis=0)
        tl.store(pieces + piece * dim + column, total, mask=column < dim)


@triton.jit
def _add_pieces(
    pieces, inverse, order, starts, out, reads, rows, dim,
    PIECE: tl.constexpr, AHEAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The pieces of a row to its head: the program of the row's first cut adds all of them, in their order."""
    piece = tl.program_id(0).to(tl.int64)
    cut = (piece + 1) * PIECE
    row, begin, end = _row_at(inverse, order, starts, cut, reads, rows)
    if (begin < cut) & (begin >= cut - PIECE):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.load(out + row * dim + column, mask=column < dim, other=0.0)
        stop = (end - 1) // PIECE  # the row's last cut is at stop * PIECE, and its piece is the one before `stop`
        while piece < stop:
            at = piece + tl.arange(0, AHEAD)
            inside = (at < stop)[:, None] & (column < dim)[None]
            total += tl.sum(tl.load(pieces + at[:, None] * dim + column[None], mask=inside, other=0.0), axis=0)
            piece += AHEAD
        tl.store(out + row * dim + column, total, mask=column < dim)
