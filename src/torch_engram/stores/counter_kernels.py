"""Random numbers that belong to a place, inside Triton kernels: the twins of :mod:`torch_engram.stores.counter`.

Functions for other kernels to call. Int64 products wrap and right shifts copy the sign, as in torch, so that the same
masks make the shifts logical and every bit is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torch_engram.stores import counter

_GAMMA = tl.constexpr(counter.GAMMA)
_MIX1 = tl.constexpr(counter.MIX1)
_MIX2 = tl.constexpr(counter.MIX2)


@triton.jit
def scramble(x):
    """splitmix64's output function on int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def draw_base(key, draw, seed_term):
    """The part of :func:`counter_bits` that all columns of a row share; ``key`` and ``draw`` are int64."""
    return scramble(scramble(key * _GAMMA + seed_term) + draw * _MIX2)


@triton.jit
def counter_bits(base, column, PLANE: tl.constexpr):
    """64 random bits for int64 columns of one plane, from a :func:`draw_base` that broadcasts against them."""
    return scramble(base + (column + ((PLANE << 32) + 1)) * _GAMMA)


@triton.jit
def initial_row(key, column, seed_term, scale):
    """Initial values fp32 ``[rows, columns]`` of keys ``[rows]``; ``scale`` is :func:`counter.initial_scale`'s."""
    bits = counter_bits(draw_base(key, tl.full(key.shape, -1, tl.int64), seed_term)[:, None], column[None], 0)
    total = (bits & 0xFFFF) + ((bits >> 16) & 0xFFFF) + ((bits >> 32) & 0xFFFF) + ((bits >> 48) & 0xFFFF)
    return (2 * total - 0x3FFFC).to(tl.float32) * scale
