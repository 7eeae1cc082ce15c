"""The Triton twin of :mod:`torch_engram.stores.embedding`: every codec for values, any width, any distance of rows.

A codec is a function from the numbers as they are stored to fp32. Codes of one byte and of two are widened by integer
arithmetic, which is exact and the same everywhere. Offsets are int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.stores.embedding import Columns
from torch_engram.stores.records import RecordLayout

_TILE = 2048
"""Numbers that one program reads together."""
_STORED = {"fp32": torch.float32, "bf16": torch.int16, "fp16": torch.float16, "fp8": torch.uint8, "int8": torch.int8}
"""As what a kernel reads the codes."""
_SCALES = {"fp8": torch.uint8, "int8": torch.float32}
_VARYING = ("rows", "positions")
"""Numbers that differ from batch to batch: the kernel is not compiled anew for those that 16 divides."""
_BLOCK = tl.constexpr(32)
"""Numbers that share a scale of E4M3."""


def embed_triton(
    layout: RecordLayout, records: Tensor, fetched: Tensor, where: Tensor, columns: Columns, out: Tensor
) -> Tensor:
    """See :func:`torch_engram.stores.embedding.embed`."""
    plane = layout.plane("value")
    stored, scales = _STORED[plane.codec], _SCALES.get(plane.codec, torch.uint8)
    value, *scale = (field for field in layout.fields if field.plane == "value")
    rows, width = out.shape[0] * out.shape[1] * len(columns.group), triton.next_power_of_2(plane.width)
    if not rows:
        return out
    tile = min(width, _TILE)
    many = _TILE // tile
    _embed[(triton.cdiv(rows, many), triton.cdiv(plane.width, tile))](
        records.view(stored), records.view(scales), fetched.view(stored), fetched.view(scales),
        where, columns.group, columns.part, out,
        rows, out.shape[1], columns.groups, out.stride(0), out.stride(1),
        COLUMNS=len(columns.group), WIDTH=plane.width, CODEC=plane.codec,
        STRIDE=layout.nbytes // stored.itemsize, START=value.start // stored.itemsize,
        SCALE_STRIDE=layout.nbytes // scales.itemsize, SCALE_START=scale[0].start // scales.itemsize if scale else 0,
        ROWS=many, TILE=tile,
    )  # fmt: skip
    return out


@triton.jit
def _e4m3(code):
    """E4M3 codes uint8 to fp32: the exponent and mantissa moved to fp32's places are 2**-120 of the number."""
    bits = code.to(tl.int32)
    size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
    size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
    sign = (bits & 0x80) << 24  # a bit like any other, for a difference from 0 would make 0 of -0
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _values(codes, scales, record, column, inside, CODEC: tl.constexpr, STRIDE: tl.constexpr, START: tl.constexpr,
            SCALE_STRIDE: tl.constexpr, SCALE_START: tl.constexpr):  # fmt: skip
    """Numbers fp32 of some records ``[rows]`` and columns ``[columns]``, 0 outside."""
    code = tl.load(codes + record[:, None] * STRIDE + START + column[None], mask=inside, other=0)
    if CODEC == "bf16":
        return (code.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if CODEC == "fp8":
        scale = tl.load(
            scales + record[:, None] * SCALE_STRIDE + SCALE_START + (column // _BLOCK)[None], mask=inside, other=0
        )
        return _e4m3(code) * (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    if CODEC == "int8":
        scale = tl.load(scales + record * SCALE_STRIDE + SCALE_START, mask=record >= 0, other=0.0)
        return code.to(tl.float32) * scale[:, None]
    return code.to(tl.float32)


@triton.jit(do_not_specialize=_VARYING)
def _embed(
    codes, scales, fetched_codes, fetched_scales, where, group, part, out,
    rows, positions, groups, space_stride, stride,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CODEC: tl.constexpr, STRIDE: tl.constexpr, START: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, SCALE_START: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = row < rows
    position, read = row // COLUMNS, row % COLUMNS
    first = tl.load(where + position * groups + tl.load(group + read), mask=here, other=0)
    nth = tl.load(part + read)
    cached = here & (first >= 0)
    wide = (column < WIDTH)[None]
    place = position // positions * space_stride + position % positions * stride + read * WIDTH
    place = place[:, None] + column[None]
    inside = cached[:, None] & wide
    value = _values(codes, scales, tl.where(cached, first + nth, 0), column, inside,
                    CODEC, STRIDE, START, SCALE_STRIDE, SCALE_START)  # fmt: skip
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
    outside = here & (first < 0)
    if tl.max(outside.to(tl.int32), axis=0) > 0:  # where a set was full
        inside = outside[:, None] & wide
        value = _values(fetched_codes, fetched_scales, tl.where(outside, -2 - first + nth, 0), column, inside,
                        CODEC, STRIDE, START, SCALE_STRIDE, SCALE_START)  # fmt: skip
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
