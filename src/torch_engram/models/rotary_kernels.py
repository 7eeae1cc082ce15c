"""Norm and rotation of queries and keys in Triton; the twin is ``turn_naive`` in :mod:`torch_engram.models.rotary`.

B batch, T tokens, H query heads, G key heads, D width of a head; a head is two halves (a, b), whose pairs turn. With
r = 1 / sqrt(mean(x**2) + eps), x = (a, b), n = r * x, y = n * scale, and ' for gradients:

    query, key = (y_a * cos - y_b * sin, y_b * cos + y_a * sin)
    y'     = (g_a * cos + g_b * sin, g_b * cos - g_a * sin)         g = query' or key'
    scale' = sum over tokens and heads of y' * n                    m = y' * scale
    x'     = r * (m - n * mean(m * n))

A program takes some tokens of one sequence and goes through their heads, so that angles and scales are read once. All
is fp32 and rounded once. Scales' gradients are one part a program, added up afterwards, in order. Tokens are int64 in
addresses: B * T * (H + 2G) * D may pass 2**31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FORWARD_NUMBERS, _BACKWARD_NUMBERS = 1024, 1024
"""Numbers of a tile of tokens by half a head."""


def turn_triton(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries ``[B, T, H, D]`` and keys ``[B, T, G, D]`` from contiguous ``qkv`` ``[B, T, (H + 2G) * D]``.

    The scales are fp32 ``[D]``; ``cos`` and ``sin`` are contiguous fp32 ``[B or 1, T, 1, D / 2]``.
    """
    sizes, grid = _sizes(qkv, query_norm, heads, _FORWARD_NUMBERS)
    batch, tokens, width = *qkv.shape[:2], sizes["D"]
    query, key = (qkv.new_empty(batch, tokens, sizes[count], width) for count in ("H", "G"))
    _norm_turn[grid](qkv, query_norm, key_norm, cos, sin, query, key, tokens, _turns(cos), eps, **sizes)
    return query, key


def turn_backward_triton(
    grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, query_norm: Tensor, key_norm: Tensor,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``qkv`` and of both scales, from those of queries, keys and values ``[B, T, heads, D]``.

    The three may lie in memory as they like, if only their numbers of a head follow each other.
    """
    sizes, grid = _sizes(qkv, query_norm, grads[0].shape[2], _BACKWARD_NUMBERS)
    grad_qkv = torch.empty_like(qkv)
    parts = qkv.new_empty(grid[0], 2, sizes["D"], dtype=torch.float32)
    assert all(grad.stride(3) == 1 for grad in grads)
    strides = [stride for grad in grads for stride in grad.stride()[:3]]
    _norm_turn_backward[grid](
        *grads, *strides, qkv, query_norm, key_norm, cos, sin, grad_qkv, parts,
        qkv.shape[1], _turns(cos), eps, **sizes,
    )  # fmt: skip
    grad_query_norm, grad_key_norm = parts.sum(0)
    return grad_qkv, grad_query_norm, grad_key_norm.clone()


def _sizes(qkv: Tensor, norm: Tensor, heads: int, numbers: int) -> tuple[dict[str, int], tuple[int]]:
    """The kernels' constants and their grid."""
    batch, tokens, width = *qkv.shape[:2], norm.shape[0]
    half = triton.next_power_of_2(width // 2)
    # No more tokens than a sequence has: in decoding that is one.
    rows = min(max(1, numbers // half), triton.next_power_of_2(max(1, tokens)))
    sizes = dict(H=heads, G=(qkv.shape[2] // width - heads) // 2, D=width, HALF=half, TOKENS=rows)
    return sizes, (batch * triton.cdiv(tokens, rows),)


def _turns(cos: Tensor) -> int:
    """From one sequence's angles to the next one's; 0 where all have the same."""
    return cos.stride(0) if cos.shape[0] > 1 else 0


@triton.jit
def _place_of(tokens, D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr):
    """A program's sequence, its tokens in it, their numbers in half a head, and which of these there are."""
    tiles = tl.cdiv(tokens, TOKENS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, HALF)
    return batch, token, pair, (token < tokens)[:, None] & (pair < D // 2)[None]


@triton.jit
def _angles(cos, sin, sequence, token, pair, inside, D: tl.constexpr):
    """Cosines and sines of some tokens; ``sequence`` is where those of their sequence begin."""
    angle = sequence + token[:, None] * (D // 2) + pair[None]
    return tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)


@triton.jit
def _halves(at, inside, D: tl.constexpr):
    """Both halves of a head of some tokens."""
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + D // 2, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_halves(at, a, b, inside, D: tl.constexpr):
    tl.store(at, a.to(at.dtype.element_ty), mask=inside)
    tl.store(at + D // 2, b.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _turn_heads(x, scale, c, s, to, inside, pair, eps, HEADS: tl.constexpr, D: tl.constexpr):
    """Norms and turns HEADS heads, which begin at the addresses ``x``; ``to`` is where they go."""
    scale_a, scale_b = _halves(scale + pair, pair < D // 2, D)
    for head in range(HEADS):
        a, b = _halves(x + head * D, inside, D)
        r = 1.0 / tl.sqrt(tl.sum(a * a + b * b, axis=1) / D + eps)
        a, b = a * r[:, None] * scale_a[None], b * r[:, None] * scale_b[None]
        _store_halves(to + head * D, a * c - b * s, b * c + a * s, inside, D)


@triton.jit
def _norm_turn(
    qkv, query_norm, key_norm, cos, sin, query, key, tokens, turns, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    batch, token, pair, inside = _place_of(tokens, D, HALF, TOKENS)
    c, s = _angles(cos, sin, batch * turns, token, pair, inside, D)
    row = (batch * tokens + token)[:, None]
    x = qkv + row * ((H + 2 * G) * D) + pair[None]
    _turn_heads(x, query_norm, c, s, query + row * (H * D) + pair[None], inside, pair, eps, H, D)
    _turn_heads(x + H * D, key_norm, c, s, key + row * (G * D) + pair[None], inside, pair, eps, G, D)


@triton.jit
def _turn_back(
    grad, stride, x, scale, c, s, to, part, inside, pair, eps,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Gradients of HEADS heads, whose own gradients are ``stride`` apart, and a part of that of their scale."""
    scale_a, scale_b = _halves(scale + pair, pair < D // 2, D)
    total_a, total_b = tl.zeros([TOKENS, HALF], tl.float32), tl.zeros([TOKENS, HALF], tl.float32)
    for head in range(HEADS):
        a, b = _halves(x + head * D, inside, D)
        g_a, g_b = _halves(grad + tl.cast(head, tl.int64) * stride, inside, D)
        r = (1.0 / tl.sqrt(tl.sum(a * a + b * b, axis=1) / D + eps))[:, None]
        a, b = a * r, b * r
        y_a, y_b = g_a * c + g_b * s, g_b * c - g_a * s
        total_a += y_a * a
        total_b += y_b * b
        y_a, y_b = y_a * scale_a[None], y_b * scale_b[None]
        along = (tl.sum(y_a * a + y_b * b, axis=1) / D)[:, None]
        _store_halves(to + head * D, r * (y_a - a * along), r * (y_b - b * along), inside, D)
    _store_halves(part + pair, tl.sum(total_a, axis=0), tl.sum(total_b, axis=0), pair < D // 2, D)


@triton.jit
def _norm_turn_backward(
    grad_query, grad_key, grad_value, query_b, query_t, query_h, key_b, key_t, key_h, value_b, value_t, value_h,
    qkv, query_norm, key_norm, cos, sin, grad_qkv, parts, tokens, turns, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    batch, token, pair, inside = _place_of(tokens, D, HALF, TOKENS)
    c, s = _angles(cos, sin, batch * turns, token, pair, inside, D)
    at = (batch * tokens + token)[:, None] * ((H + 2 * G) * D) + pair[None]
    part = parts + tl.program_id(0).to(tl.int64) * (2 * D)
    grad = grad_query + batch * query_b + token[:, None] * query_t + pair[None]
    x, to = qkv + at, grad_qkv + at
    _turn_back(grad, query_h, x, query_norm, c, s, to, part, inside, pair, eps, H, D, HALF, TOKENS)
    x, to = x + H * D, to + H * D
    grad = grad_key + batch * key_b + token[:, None] * key_t + pair[None]
    _turn_back(grad, key_h, x, key_norm, c, s, to, part + D, inside, pair, eps, G, D, HALF, TOKENS)
    grad = grad_value + batch * value_b + token[:, None] * value_t + pair[None]
    for head in range(G):
        a, b = _halves(grad + tl.cast(head, tl.int64) * value_h, inside, D)
        _store_halves(to + (G + head) * D, a, b, inside, D)
