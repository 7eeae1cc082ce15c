"""The fusion after its matrix product as one operator for autograd and ``torch.compile``, on a GPU.

``fuse_triton`` is the twin of :meth:`torch_engram.fusion.Engram.fuse_naive`, but for one rounding: what the convolution
reads stays fp32 and is not rounded to the streams' type first. Between forward and backward it keeps its inputs and
six fp32 numbers a token and branch; nothing of the streams' size besides.
Shapes: B batch, T tokens, n = B * T, M branches, d hidden, k taps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from torch_engram.fusion.backward_kernels import (
    _add_through_norm,
    _convolution_slopes,
    _gate_slopes,
    _key_gradients,
    _value_gradients,
)
from torch_engram.fusion.forward_kernels import _add, _measure

_ROWS, _ROW_CHUNK = 8, 512
"""Tokens and channels that a program summing rows holds."""
_TOKENS, _CHUNK = 16, 64
"""Tokens and channels of a tile: an access is 128 bytes wide in bf16."""
_BLOCK = 128
"""Tokens that a program goes through, and so of one part of a sum over tokens."""
_GATES = 128


def fuse_triton(
    streams: Tensor,
    keys_value: Tensor,
    weight: Tensor,
    conv_weight: Tensor | None,
    taps: Tensor | None,
    *,
    age: Tensor,
    live: Tensor | None,
    gate_eps: float,
    conv_eps: float,
    dilation: int,
    copies_sign: bool,
) -> tuple[Tensor, Tensor]:
    """Streams with the memory added, and the gates fp32 ``[B, T, M]``.

    ``streams`` ``[B, T, M, d]``; ``keys_value`` ``[B, T, (M + 1) * d]``; ``weight`` fp32 ``[M, d]``, the product of the
    weights of queries and keys; ``conv_weight`` ``[M, d]`` and ``taps`` ``[k, M, d]`` fp32, both None without a
    convolution; ``age`` int32 ``[B, T]``: how many positions it may look back; ``live`` bool ``[B, T]``.
    """
    if taps is None or conv_weight is None:
        conv_weight, taps, conv_eps = weight.new_empty(weight.shape), weight.new_empty(0, *weight.shape), 1.0
    out, alpha, *_ = _fuse(
        streams.contiguous(), keys_value.contiguous(), weight, conv_weight, taps, age, live,
        gate_eps, conv_eps, dilation, copies_sign,
    )  # fmt: skip
    return out, alpha


@torch.library.custom_op("torch_engram::fuse", mutates_args=())
def _fuse(
    streams: Tensor, keys_value: Tensor, weight: Tensor, conv_weight: Tensor, taps: Tensor, age: Tensor,
    live: Tensor | None, gate_eps: float, conv_eps: float, dilation: int, copies_sign: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Streams, gates; r, inverse root mean squares of queries and keys, scores, q**(-1/2), each ``[B, T, M]``."""
    batch, length, branches, hidden = streams.shape
    tokens = batch * length
    out = torch.empty_like(streams)
    statistics = [torch.empty(streams.shape[:3], device=streams.device, dtype=torch.float32) for _ in range(6)]
    if tokens:
        _measure[(triton.cdiv(tokens, _ROWS),)](
            streams, keys_value, weight, live, *statistics, tokens, gate_eps, conv_eps, hidden**-0.5,
            M=branches, D=hidden, SIGNED_ZERO=copies_sign, LIVE=live is not None, TOKENS=_ROWS,
            CHUNK=_chunk(hidden, _ROW_CHUNK),
        )  # fmt: skip
        _add[(triton.cdiv(tokens, _BLOCK) * _chunks(hidden) * branches,)](
            streams, keys_value, *statistics[:2], taps * conv_weight, age, out, tokens, dilation,
            M=branches, D=hidden, TAPS=len(taps), BLOCK=_BLOCK, TOKENS=_TOKENS, CHUNK=_chunk(hidden, _CHUNK),
        )  # fmt: skip
    alpha, value_scale, query_rms, key_rms, score, value_rms = statistics
    return out, alpha, value_scale, query_rms, key_rms, score, value_rms


@_fuse.register_fake
def _(streams: Tensor, *others: Any) -> tuple[Tensor, ...]:
    statistics = (torch.empty(streams.shape[:3], device=streams.device, dtype=torch.float32) for _ in range(6))
    return torch.empty_like(streams), *statistics


@torch.library.custom_op("torch_engram::fuse_backward", mutates_args=())
def _fuse_backward(
    grad: Tensor, grad_alpha: Tensor, streams: Tensor, keys_value: Tensor, weight: Tensor, conv_weight: Tensor,
    taps: Tensor, age: Tensor, alpha: Tensor, value_scale: Tensor, query_rms: Tensor, key_rms: Tensor, score: Tensor,
    value_rms: Tensor, conv_eps: float, dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of streams, keys and value, weight, conv_weight and taps."""
    batch, length, branches, hidden = streams.shape
    tokens, count = batch * length, len(taps)
    blocks, chunks = triton.cdiv(tokens, _BLOCK), _chunks(hidden)
    fp32: dict[str, Any] = {"device": streams.device, "dtype": torch.float32}
    grad_streams, grad_keys_value = torch.empty_like(streams), torch.empty_like(keys_value)
    row_sums = torch.empty(chunks, 2, branches, tokens, **fp32)
    tap_sums = torch.empty(blocks, count, branches, hidden, **fp32)
    weight_sums = torch.empty(blocks, branches, hidden, **fp32)
    dz = torch.empty_like(streams) if count else streams
    factors = [torch.empty(tokens, branches, **fp32) for _ in range(4)]
    if tokens:
        kernel = taps * conv_weight
        tile: dict[str, Any] = {"M": branches, "D": hidden, "TOKENS": _TOKENS, "CHUNK": _chunk(hidden, _CHUNK)}
        tiles = (triton.cdiv(tokens, _TOKENS) * chunks,)
        if count:
            _convolution_slopes[(blocks * chunks * branches,)](
                grad, keys_value, value_scale, kernel, age, dz, tap_sums, tokens, dilation,
                TAPS=count, BLOCK=_BLOCK, **tile,
            )  # fmt: skip
        _value_gradients[tiles](
            grad, keys_value, dz, alpha, value_scale, kernel, age, grad_keys_value, row_sums, tokens, dilation,
            TAPS=count, **tile,
        )  # fmt: skip
        _gate_slopes[(triton.cdiv(tokens, _GATES), branches)](
            row_sums, grad_alpha, alpha, query_rms, key_rms, score, value_rms, *factors, tokens, chunks,
            conv_eps, hidden**-0.5, M=branches, D=hidden, TAPS=count, TOKENS=_GATES,
        )  # fmt: skip
        _key_gradients[(blocks * chunks * branches,)](
            grad, streams, keys_value, weight, *factors[:3], grad_streams, grad_keys_value, weight_sums, tokens,
            BLOCK=_BLOCK, **tile,
        )  # fmt: skip
        if count:
            _add_through_norm[tiles](keys_value, factors[3], grad_keys_value, tokens, **tile)
    of_taps = tap_sums.sum(0)  # of dz * r * v: both parameters of the convolution multiply it
    grad_conv = (of_taps * taps).sum(0) if count else torch.empty_like(conv_weight)
    grad_taps = of_taps * conv_weight if count else torch.empty_like(taps)
    return grad_streams, grad_keys_value, weight_sums.sum(0), grad_conv, grad_taps


@_fuse_backward.register_fake
def _(
    grad: Tensor, grad_alpha: Tensor, streams: Tensor, keys_value: Tensor, weight: Tensor, conv_weight: Tensor,
    taps: Tensor, *others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(torch.empty_like(like) for like in (streams, keys_value, weight, conv_weight, taps))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    streams, keys_value, weight, conv_weight, taps, age, _, _, conv_eps, dilation, _ = inputs
    ctx.save_for_backward(streams, keys_value, weight, conv_weight, taps, age, *output[1:])
    ctx.settings = conv_eps, dilation


def _backward(ctx: Any, grad: Tensor, grad_alpha: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grads = _fuse_backward(grad.contiguous(), grad_alpha.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return *grads, *[None] * 6


_fuse.register_autograd(_backward, setup_context=_save)


def _chunk(hidden: int, most: int) -> int:
    chunk: int = min(most, triton.next_power_of_2(hidden))
    return chunk


def _chunks(hidden: int) -> int:
    chunks: int = triton.cdiv(hidden, _chunk(hidden, _CHUNK))
    return chunks
