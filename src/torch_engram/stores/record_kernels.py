"""Kernels on the encoded records of a step's rows, which stay where the store put them and are changed in place.

The twins of :mod:`torch_engram.stores.decoded` and of the codecs fp32 and bf16. Offsets are int64: a step's records may
be more than 2**31 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.stores.counter import initial_scale, seed_term
from torch_engram.stores.counter_kernels import counter_bits, draw_base, initial_row

_TILE = 1024
"""Numbers that one program works on together."""
_ROWS_A_PROGRAM = 16
_WORDS_TOGETHER = 64


def tile(dim: int) -> dict[str, int]:
    """The constants ``ROWS`` and ``DIM`` of a kernel whose programs take ``ROWS`` rows of ``dim`` numbers each."""
    padded = triton.next_power_of_2(dim)
    return {"ROWS": max(1, _TILE // padded), "DIM": padded}


def initial_triton(keys: Tensor, stored: Tensor, counts: Tensor, seed: int, std: float) -> None:
    """Give rows that were never written their initial value.

    ``stored`` ``[U, dim]``, fp32 or bf16, and ``counts`` int32 ``[U, 1]`` are views of records.
    """
    if not len(keys):
        return
    sizes = tile(stored.shape[1])
    _initial[(triton.cdiv(len(keys), sizes["ROWS"]),)](
        keys, stored, counts, len(keys), stored.shape[1], stored.stride(0), counts.stride(0),
        seed_term(seed), initial_scale(std), ROUNDS=stored.dtype == torch.bfloat16, **sizes,
    )  # fmt: skip


def lay_over_triton(keys: Tensor, records: Tensor, new_keys: Tensor, new_records: Tensor, changed: Tensor) -> None:
    """Replace records uint8 ``[U, nbytes]`` whose key is among ``new_keys``, ascending and not empty, and mark them in
    ``changed`` bool ``[U]``."""
    if not len(keys):
        return
    words = records.shape[1] // 8
    _lay_over[(triton.cdiv(len(keys), _ROWS_A_PROGRAM),)](
        keys, records.view(torch.int64), new_keys, new_records.view(torch.int64), changed.view(torch.uint8),
        len(keys), len(new_keys), words, len(new_keys).bit_length(), ROWS=_ROWS_A_PROGRAM, WORDS=_WORDS_TOGETHER,
    )  # fmt: skip


@triton.jit
def round_to_bf16(number):
    """Finite fp32 to the nearest bf16, ties to even, still as fp32."""
    bits = number.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def store_value(
    stored, place, number, inside, key, count, column, seed_term, PLANE: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """Encode fp32 ``[rows, columns]``: as it is, or to bf16 rounded stochastically as the codec does."""
    if STOCHASTIC:
        noise = counter_bits(draw_base(key, count.to(tl.int64), seed_term)[:, None], column[None], PLANE)
        bits = number.to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        rounded = (bits + (noise & 0xFFFF).to(tl.int32)) & -0x10000
        number = tl.where(finite, rounded, bits).to(tl.float32, bitcast=True)
    tl.store(stored + place, number.to(stored.dtype.element_ty), mask=inside)


@triton.jit
def _initial(
    keys, stored, counts, rows, dim, stored_stride, count_stride, seed_term, scale,
    ROUNDS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    fresh = (row < rows) & (tl.load(counts + row * count_stride, mask=row < rows, other=1) == 0)
    if tl.sum(fresh.to(tl.int32), axis=0) > 0:  # seldom
        column = tl.arange(0, DIM).to(tl.int64)
        number = initial_row(tl.load(keys + row, mask=fresh, other=0), column, seed_term, scale)
        if ROUNDS:
            number = round_to_bf16(number)
        inside = fresh[:, None] & (column < dim)[None]
        tl.store(stored + row[:, None] * stored_stride + column[None], number.to(stored.dtype.element_ty), mask=inside)


@triton.jit
def _lay_over(
    keys, records, new_keys, new_records, changed, rows, new_rows, words, halvings,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key = tl.load(keys + row, mask=row < rows, other=-1)
    low = tl.zeros([ROWS], tl.int64)
    high = low + new_rows
    for _ in range(halvings):
        middle = (low + high) // 2
        open = low < high
        less = tl.load(new_keys + middle, mask=open, other=0) < key
        low = tl.where(open & less, middle + 1, low)
        high = tl.where(open & (less == 0), middle, high)
    found = low < new_rows
    hit = (row < rows) & found & (tl.load(new_keys + low, mask=found, other=-2) == key)
    if tl.max(hit.to(tl.int32), axis=0) > 0:
        tl.store(changed + row, tl.full([ROWS], 1, tl.uint8), mask=hit)
        for first in range(0, words, WORDS):
            word = first + tl.arange(0, WORDS)
            inside = hit[:, None] & (word < words)[None]
            new = tl.load(new_records + low[:, None] * words + word[None], mask=inside)
            tl.store(records + row[:, None] * words + word[None], new, mask=inside)
