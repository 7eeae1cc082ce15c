"""Queries and keys made ready for attention: each head normed, scaled and turned by its token's place.

Shapes: B batch, T tokens, H query heads, G key (and value) heads, D width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_engram.kernels import use_kernels


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864): pairs (i, i + D / 2) of ``[B, T, heads, D]`` turned by their angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def turn(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, H, T, D]``, keys and values ``[B, G, T, D]`` from ``qkv`` ``[B, T, (H + 2G) * D]``, of its type.

    The scales ``query_norm`` and ``key_norm`` are ``[D]``, ``cos`` and ``sin`` fp32 ``[B or 1, T, 1, D / 2]``. On a GPU
    this is one kernel each way (:mod:`torch_engram.models.rotary_fused`), which computes in fp32 and rounds once.
    """
    if use_kernels(qkv):
        from torch_engram.models.rotary_fused import turn_fused

        return turn_fused(qkv, query_norm, key_norm, cos, sin, heads, eps)
    return turn_naive(qkv, query_norm, key_norm, cos, sin, heads, eps)


def turn_naive(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`turn` in PyTorch's own operators, on any device."""
    width = query_norm.shape[0]
    rows = qkv.unflatten(-1, (-1, width))
    groups = (rows.shape[2] - heads) // 2
    turned, value = rows.split((heads + groups, groups), dim=2)
    scale = torch.cat((query_norm.expand(heads, -1), key_norm.expand(groups, -1)))
    turned = F.rms_norm(turned, (width,), eps=eps) * scale
    query, key = rotate(turned, cos, sin).to(value.dtype).split((heads, groups), dim=2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
