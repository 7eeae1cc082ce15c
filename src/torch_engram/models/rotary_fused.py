"""Norm and rotation of queries and keys on a GPU, as operators that compilers, recompute and graph capture see whole.

Bandwidth alone decides their time, so nothing is moved twice: values stay where the matrix product wrote them, and the
way back writes the gradient of the whole product at once, that of the values with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_engram.models.rotary_kernels import turn_backward_triton, turn_triton


def turn_fused(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`torch_engram.models.rotary.turn_naive`; no gradient flows to ``cos`` and ``sin``."""
    tensors = (qkv, query_norm.float(), key_norm.float(), cos, sin)
    query, key, value = _Turn.apply(*(tensor.contiguous() for tensor in tensors), heads, eps)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


@torch.library.custom_op("torch_engram::turn", mutates_args=())
def _turn(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    return turn_triton(qkv, query_norm, key_norm, cos, sin, heads, eps)


@_turn.register_fake
def _(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, ...]:
    (batch, tokens, total), width = qkv.shape, query_norm.shape[0]
    counts = (heads, (total // width - heads) // 2)
    return tuple(qkv.new_empty(batch, tokens, count, width) for count in counts)


@torch.library.custom_op("torch_engram::turn_backward", mutates_args=())
def _turn_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, qkv: Tensor, query_norm: Tensor, key_norm: Tensor,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # Attention hands back transposed views, which the kernel reads as they lie.
    query, key, value = (
        grad if grad.stride(3) == 1 else grad.contiguous() for grad in (grad_query, grad_key, grad_value)
    )
    return turn_backward_triton((query, key, value), qkv, query_norm, key_norm, cos, sin, eps)


@_turn_backward.register_fake
def _(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, qkv: Tensor, query_norm: Tensor, key_norm: Tensor,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(torch.empty_like(tensor) for tensor in (qkv, query_norm, key_norm))


class _Turn(torch.autograd.Function):
    """Values are a view of ``qkv``, which an operator may not return."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, _, eps = inputs
        query, key = _turn(*inputs)
        ctx.save_for_backward(*tensors)
        ctx.eps = eps
        value = tensors[0].unflatten(-1, (-1, query.shape[3]))[:, :, query.shape[2] + key.shape[2] :]
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_turn_backward(*grads, *ctx.saved_tensors, ctx.eps), None, None, None, None
