"""A decoding step's own kernels in Triton; the twins are in :mod:`decoding.attention`.

A program of the attention has one sequence and one key head, and all query heads that share it: it norms and turns
them, adds the new key and value to the cache, and goes through the sequence's keys and values once. Of few sequences
there are few programs, which matters little: the weights then take nearly all of a step. Places in the cache are int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from decoding.attention import EPS
from torch_engram.bench.timing import median, milliseconds

LOG2_E = 1.4426950408889634
_ACTIVATION = 1024
_SETTINGS: list[dict[str, int]] = [
    {"BLOCK": block, "STAGES": stages, "num_warps": warps}
    for block, stages, warps in ((64, 3, 4), (32, 4, 2), (32, 4, 4), (128, 2, 4))
]
_chosen: dict[str, int] = _SETTINGS[0]


def choose_setting(attend: Callable[[], Any]) -> dict[str, int]:
    """Let attention have the setting that is the fastest for such calls on this GPU, and return it."""
    global _chosen
    times = {}
    for number, _chosen in enumerate(_SETTINGS):
        times[number] = median(milliseconds(attend, repeats=15))
    _chosen = _SETTINGS[min(times, key=times.__getitem__)]
    return _chosen


def attend_triton(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, cells: Tensor, starts: Tensor,
    lengths: Tensor,
) -> Tensor:  # fmt: skip
    """As ``attend_naive``; all tensors are contiguous, ``starts`` int64 ``[B]``, ``lengths`` int32 ``[B]``."""
    groups, width = cells.shape[1], cells.shape[3]
    heads = qkv.shape[1] // width - 2 * groups
    assert width == triton.next_power_of_2(width) >= 16 and heads % groups == 0
    rows = max(16, triton.next_power_of_2(heads // groups))  # a matrix product has no fewer
    out = qkv.new_empty(len(qkv), heads * width)
    _attend[(len(qkv) * groups,)](
        qkv, query_norm, key_norm, cos, sin, cells, starts, lengths, out, width**-0.5 * LOG2_E, EPS,
        H=heads, G=groups, D=width, ROWS=rows, **_chosen,
    )  # fmt: skip
    return out


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[B, n]`` from contiguous ``[B, 2n]``."""
    inner = gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), inner)
    _swiglu[(len(gate_up), triton.cdiv(inner, _ACTIVATION))](gate_up, out, N=inner, BLOCK=_ACTIVATION)
    return out


@triton.jit
def _turned(heads, here, scale, cos, sin, eps, D: tl.constexpr):
    """Heads ``[rows, D]`` in fp32, normed, scaled and turned; ``heads``: where each begins. Zero where not ``here``."""
    number = tl.arange(0, D)
    other = (number + D // 2) % D  # the one that it is turned with
    x = tl.load(heads + number[None], mask=here, other=0.0).to(tl.float32)
    y = tl.load(heads + other[None], mask=here, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    x = x * r * tl.load(scale + number).to(tl.float32)[None]
    y = y * r * tl.load(scale + other).to(tl.float32)[None]
    c, s = tl.load(cos + number % (D // 2)), tl.load(sin + number % (D // 2))
    return x * c[None] + y * tl.where(number < D // 2, -s, s)[None]


@triton.jit
def _attend(
    qkv, query_norm, key_norm, cos, sin, cells, starts, lengths, out, scale, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sequence, group = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    start, length = tl.load(starts + sequence), tl.load(lengths + sequence)
    row, one, number = tl.arange(0, ROWS)[:, None], tl.arange(0, 1)[:, None], tl.arange(0, D)
    heads, here = qkv + sequence * ((H + 2 * G) * D), row < H // G
    cos, sin = cos + length.to(tl.int64) * (D // 2), sin + length.to(tl.int64) * (D // 2)
    query = _turned(heads + (group * (H // G) + row) * D, here, query_norm, cos, sin, eps, D)
    query = query.to(cells.dtype.element_ty)
    key = _turned(heads + (H + group + one) * D, one < 1, key_norm, cos, sin, eps, D).to(cells.dtype.element_ty)
    value = tl.load(heads + (H + G + group + one) * D + number[None])
    new = cells + ((start + length + one) * G + group) * (2 * D) + number[None]
    tl.store(new, key)
    tl.store(new + D, value)
    # The new token is the first to be attended to; the cache is read below it only.
    most = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1) * scale
    total = tl.full([ROWS], 1.0, tl.float32)
    mixed = tl.zeros([ROWS, D], tl.float32) + value.to(tl.float32)
    for first in tl.range(0, length, BLOCK, num_stages=STAGES):
        token = first + tl.arange(0, BLOCK)
        inside = token < length
        at = cells + ((start + token) * G + group)[:, None] * (2 * D) + number[None]
        k = tl.load(at, mask=inside[:, None], other=0.0)
        v = tl.load(at + D, mask=inside[:, None], other=0.0)
        score = tl.where(inside[None], tl.dot(query, tl.trans(k), input_precision="ieee") * scale, -float("inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        weight, kept = tl.exp2(score - higher[:, None]), tl.exp2(most - higher)
        total = total * kept + tl.sum(weight, axis=1)
        mixed = tl.dot(weight.to(v.dtype), v, mixed * kept[:, None], input_precision="ieee")
        most = higher
    mixed = mixed / total[:, None]
    to = out + sequence * (H * D) + (group * (H // G) + row) * D + number[None]
    tl.store(to, mixed.to(out.dtype.element_ty), mask=here)


@triton.jit
def _swiglu(gate_up, out, N: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * (2 * N) + column, mask=column < N, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * N) + N + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=column < N)
