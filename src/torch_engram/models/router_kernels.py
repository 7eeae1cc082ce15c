"""The choice of experts in Triton; the twin is ``choose_naive`` in :mod:`torch_engram.models.router`.

n tokens, E experts, k of them a token. With p the chosen scores, S their sum and g = p / S the gates, the way back is

    logit' = p * (1 - p) * (g' - sum(g' * g)) / S        of the chosen, 0 of the others

All is fp32. Tokens are int64 in addresses: n * E may pass 2**31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048
"""Numbers of a tile of tokens by experts."""


def choose_triton(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen experts (int64), their gates and their scores (fp32), ``[n, k]``, from contiguous fp32 ``[n, E]``."""
    tokens, experts = logits.shape
    chosen = logits.new_empty(tokens, top_k, dtype=torch.int64)
    gates, scores = (logits.new_empty(tokens, top_k) for _ in range(2))
    sizes, grid = _sizes(tokens, experts, top_k)
    _choose[grid](logits, bias, chosen, gates, scores, tokens, **sizes)
    return chosen, gates, scores


def choose_backward_triton(grad: Tensor, chosen: Tensor, scores: Tensor, experts: int) -> Tensor:
    """The gradient of the logits ``[n, E]`` from that of the gates ``[n, k]``."""
    tokens, top_k = chosen.shape
    grad_logits = scores.new_empty(tokens, experts)
    sizes, grid = _sizes(tokens, experts, top_k)
    _choose_backward[grid](grad, chosen, scores, grad_logits, tokens, **sizes)
    return grad_logits


def _sizes(tokens: int, experts: int, top_k: int) -> tuple[dict[str, int], tuple[int]]:
    """The kernels' constants and their grid."""
    width = triton.next_power_of_2(experts)
    rows = max(1, _NUMBERS // width)
    sizes = dict(E=experts, K=top_k, SLOTS=triton.next_power_of_2(top_k), WIDTH=width, TOKENS=rows)
    return sizes, (triton.cdiv(tokens, rows),)


@triton.jit
def _ranks(value):
    """int32 that stand as fp32 ``value`` do, what is not a number highest; none is the lowest int32."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value == value, bits, 0x7FFFFFFF)


@triton.jit
def _choose(
    logits, bias, chosen, gates, scores, tokens,
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    name, slot = tl.arange(0, WIDTH)[None], tl.arange(0, SLOTS)[None]
    logit = tl.load(logits + token[:, None] * E + name, mask=here[:, None] & (name < E), other=0.0)
    score = tl.sigmoid(logit)
    rank = _ranks(score + tl.load(bias + name, mask=name < E, other=0.0).to(tl.float32))
    taken: tl.constexpr = -0x80000000  # below the rank of every number, so that an expert is taken once
    rank = tl.where(name < E, rank, taken)
    experts, kept = tl.zeros([TOKENS, SLOTS], tl.int32), tl.zeros([TOKENS, SLOTS], tl.float32)
    for turn in tl.static_range(K):
        top = tl.max(rank, axis=1)
        winner = tl.min(tl.where(rank == top[:, None], name, WIDTH), axis=1)[:, None]
        won = name == winner
        rank = tl.where(won, taken, rank)
        experts = tl.where(slot == turn, winner, experts)
        kept = tl.where(slot == turn, tl.sum(tl.where(won, score, 0.0), axis=1)[:, None], kept)
    at, inside = token[:, None] * K + slot, here[:, None] & (slot < K)
    tl.store(chosen + at, experts.to(tl.int64), mask=inside)
    tl.store(gates + at, kept / tl.sum(kept, axis=1)[:, None], mask=inside)
    tl.store(scores + at, kept, mask=inside)


@triton.jit
def _choose_backward(
    grad, chosen, scores, grad_logits, tokens,
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    total, along = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    for slot in tl.static_range(K):
        p = tl.load(scores + token * K + slot, mask=here, other=0.5)
        total += p
        along += tl.load(grad + token * K + slot, mask=here, other=0.0) * p
    along = along / total
    name = tl.arange(0, WIDTH)[None]
    out = tl.zeros([TOKENS, WIDTH], tl.float32)
    for slot in tl.static_range(K):
        p = tl.load(scores + token * K + slot, mask=here, other=0.5)
        g = tl.load(grad + token * K + slot, mask=here, other=0.0)
        expert = tl.load(chosen + token * K + slot, mask=here, other=0).to(tl.int32)
        out = tl.where(name == expert[:, None], (p * (1.0 - p) * (g - along) / total)[:, None], out)
    tl.store(grad_logits + token[:, None] * E + name, out, mask=here[:, None] & (name < E))
