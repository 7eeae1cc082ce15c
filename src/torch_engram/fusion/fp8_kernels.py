"""FP8 with block scales on a GPU: quantisation in one pass, and the product of two quantised matrices.

The twins are ``quantise_naive`` and ``product_naive`` in :mod:`torch_engram.fusion.fp8`, which says what blocks are.
The product is for cards whose cuBLAS does not have it: Hopper's is twice as fast (docs/speed.md). Both operands lie
along what is summed over, the only order that Hopper's FP8 tensor cores read; so what must be transposed is written
transposed when it is quantised. Rows are int64 in addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.fusion.fp8 import LARGEST, SMALLEST_MAXIMUM, WIDTH, Blocks

_TILE = tl.constexpr(WIDTH)
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_MAXIMUM = tl.constexpr((127 - 100) << 23)
"""The bits of ``SMALLEST_MAXIMUM`` in fp32."""
assert SMALLEST_MAXIMUM == 2.0**-100
_WORDS = torch.uint8, torch.float32
"""What codes and scales are copied as."""
_ROW_TILES = 16
"""Tiles of rows that share their columns while these are in the L2 cache."""
_PRODUCT_WARPS, _PRODUCT_STAGES, _QUANTISE_WARPS = 8, 4, 8


def quantise_triton(x: Tensor, *, rows: bool = True, columns: bool = False, square: bool = False) -> list[Blocks]:
    """As :func:`torch_engram.fusion.fp8.quantise_naive`, ``x`` read once and contiguous."""
    if square and columns:  # blocks of 128x128 are the same in the transposed matrix
        (blocks,) = quantise_triton(x, square=True)
        turned = Blocks(
            *(part.view(kind).t().contiguous().view(part.dtype) for part, kind in zip(blocks, _WORDS, strict=True))
        )
        return [blocks, turned] if rows else [turned]
    height, width = (triton.cdiv(size, WIDTH) * WIDTH for size in x.shape)
    wanted = [shape for shape, want in (((height, width), rows), ((width, height), columns)) if want]
    found = [_empty(x, *shape, square) for shape in wanted]
    if found and height * width:
        (codes, scales), (codes_t, scales_t) = found[0], found[-1]
        _quantise[(height // WIDTH * (width // WIDTH),)](
            x, codes.view(torch.uint8), scales, codes_t.view(torch.uint8), scales_t, *x.shape, height, width,
            ROWS=rows, COLUMNS=columns, SQUARE=square, num_warps=_QUANTISE_WARPS,
        )  # fmt: skip
    return found


def _empty(x: Tensor, height: int, width: int, square: bool) -> Blocks:
    codes = x.new_empty(height, width, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(width // WIDTH, height // WIDTH if square else height, dtype=torch.float32)
    return Blocks(codes, scales)


def product_triton(a: Blocks, b: Blocks, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As :func:`torch_engram.fusion.fp8.product_naive`; ``a`` has blocks of 1x128."""
    out = a.scales.new_empty(shape, dtype=dtype)
    if out.numel():
        height, inner = a.codes.shape
        width = b.codes.shape[0]
        _product[(height // WIDTH * (width // WIDTH),)](
            a.codes, a.scales, b.codes, b.scales, out, *shape, height, width, inner,
            SQUARE=b.scales.shape[1] != width, ROW_TILES=_ROW_TILES,
            num_warps=_PRODUCT_WARPS, num_stages=_PRODUCT_STAGES,
        )  # fmt: skip
    return out


@triton.jit
def _size_bits(x):
    """Bits of |x|: they are ordered as the sizes are, then infinity, then NaN, so that a maximum of them hides none."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(largest):
    """A block's scale and what it is multiplied by, from the bits of its largest size; divided as PyTorch does."""
    largest = tl.maximum(largest, _SMALLEST_MAXIMUM).to(tl.float32, bitcast=True)
    most = tl.full(largest.shape, _LARGEST, tl.float32)
    return tl.math.div_rn(largest, most), tl.math.div_rn(most, largest)


@triton.jit
def _encode(y):
    """E4M3 codes of sizes up to 448: to nearest, ties to even. Made of integers, for Triton's own cast gives other
    codes in some layouts of a tile on a GPU, and does not round in the interpreter."""
    size = _size_bits(y)
    # 20 of 23 fraction bits go, rounded by their half; the exponent's offset is 7 and no longer 127.
    normal = (size + ((size >> 20) & 1) + (0x7FFFF - (120 << 23))) >> 20
    # Below 2**-6 codes are 2**-9 apart, as fp32 is at 2**14: the sum is rounded, and its last bits are the code.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < (121 << 23), small, tl.minimum(normal, 0x7F))  # 0x7F is NaN
    return (code | ((y.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _quantise(
    x, codes, scales, codes_t, scales_t, rows, columns, height, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SQUARE: tl.constexpr,
):  # fmt: skip
    """One tile of 128x128, along rows if ``SQUARE``; ``height`` and ``width`` are the padded sizes."""
    across = width // _TILE
    tile_row, tile_column = tl.program_id(0) // across, tl.program_id(0) % across
    row = tile_row.to(tl.int64) * _TILE + tl.arange(0, _TILE)
    column = tile_column.to(tl.int64) * _TILE + tl.arange(0, _TILE)
    inside = (row < rows)[:, None] & (column < columns)[None]
    value = tl.load(x + row[:, None] * columns + column[None], mask=inside, other=0.0).to(tl.float32)
    size = _size_bits(value)
    if SQUARE:
        scale, factor = _scale(tl.max(tl.max(size, axis=1, keep_dims=True), axis=0, keep_dims=True))
        code = _encode(value * factor)
        # All of the tile has one scale: each writes the same number to the same place.
        at = scales + tile_column * (height // _TILE) + tile_row + tl.zeros([1, 1], tl.int32)
        tl.store(at, scale)
        tl.store(codes + row[:, None] * width + column[None], code)
    else:
        if ROWS:
            scale, factor = _scale(tl.max(size, axis=1))
            tl.store(scales + tile_column.to(tl.int64) * height + row, scale)
            tl.store(codes + row[:, None] * width + column[None], _encode(value * factor[:, None]))
        if COLUMNS:
            scale, factor = _scale(tl.max(size, axis=0))
            tl.store(scales_t + tile_row.to(tl.int64) * width + column, scale)
            code = _encode(value * factor[None])
            tl.store(codes_t + column[:, None] * height + row[None], tl.trans(code))


@triton.jit
def _product(
    a, a_scales, b, b_scales, out, m, n, height, width, inner,
    SQUARE: tl.constexpr, ROW_TILES: tl.constexpr,
):  # fmt: skip
    """One tile of 128x128 of a b^T. H100's FP8 tensor cores keep some 14 bits of a running sum; each sum here ends
    after 128 terms, is scaled, and goes on in fp32."""
    down, across = height // _TILE, width // _TILE
    group = tl.program_id(0) // (ROW_TILES * across)
    left = tl.program_id(0) % (ROW_TILES * across)
    in_group = tl.minimum(down - group * ROW_TILES, ROW_TILES)
    tile_row, tile_column = group * ROW_TILES + left % in_group, left // in_group
    place = tl.arange(0, _TILE)
    row = tile_row * _TILE + place
    column = tile_column * _TILE + place
    a_at = a + row.to(tl.int64)[:, None] * inner + place[None]
    b_at = b + column.to(tl.int64)[None] * inner + place[:, None]
    a_scale_at = a_scales + row
    b_scale_at = b_scales + (tile_column if SQUARE else column)
    total = tl.zeros([_TILE, _TILE], tl.float32)
    for _ in range(inner // _TILE):
        part = tl.dot(tl.load(a_at), tl.load(b_at))
        if SQUARE:
            total += part * (tl.load(a_scale_at) * tl.load(b_scale_at))[:, None]
            b_scale_at += across
        else:
            total += part * tl.load(a_scale_at)[:, None] * tl.load(b_scale_at)[None]
            b_scale_at += width
        a_at += _TILE
        b_at += _TILE
        a_scale_at += height
    inside = (row < m)[:, None] & (column < n)[None]
    tl.store(out + row.to(tl.int64)[:, None] * n + column[None], total.to(out.dtype.element_ty), mask=inside)
