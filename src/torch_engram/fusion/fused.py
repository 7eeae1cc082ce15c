"""The fusion after its matrix product as one operator for autograd and ``torch.compile``, on a GPU.

``fuse_triton`` is the twin of :meth:`torch_engram.fusion.Engram.fuse_naive`, but for two roundings: what the
convolution reads stays fp32 and is not rounded to the streams' type first, and where the gate has that type, the gated
value is not rounded to it either. Gradients are fp32 throughout and rounded once. Between forward and backward it keeps
its inputs and six fp32 numbers a token and branch; nothing of the streams' size besides.
Shapes: B batch, T tokens, n = B * T, M branches, d hidden, k taps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from torch_engram.fusion.backward_kernels import (
    _add_through_norm,
    _gate_slopes,
    _key_gradients,
    _value_gradients,
)
from torch_engram.fusion.forward_kernels import _add, _measure

_ROWS, _ROW_CHUNK, _ROW_WARPS = 8, 512, 8
"""Tokens, channels and warps of a program that sums over channels: a warp has a row to itself."""
_TOKENS, _CHUNK = 16, 64
"""Tokens and channels of a tile: an access is 128 bytes wide in bf16."""
_BLOCK = 128
"""Tokens that a program with such tiles goes through, and so of one part of a sum over tokens."""
_STEPS, _WALKERS, _WALK_CHUNK, _WALK_WARPS, _STAGES = 128, 4, 64, 1, 3
"""Of the kernels that walk along the tokens: steps of a row, rows times branches of a tile, its channels, its warps,
and how many steps' loads are under way. One warp waits for no other, and its registers hold what four branches met."""
_GATES = 128


def fuse_triton(
    streams: Tensor,
    keys_value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    conv_weight: Tensor | None,
    taps: Tensor | None,
    *,
    age: Tensor,
    live: Tensor | None,
    gate_eps: float,
    conv_eps: float,
    dilation: int,
    copies_sign: bool,
    casts: bool,
) -> tuple[Tensor, Tensor]:
    """Streams with the memory added, and the gates fp32 ``[B, T, M]``.

    ``streams`` ``[B, T, M, d]``; ``keys_value`` ``[B, T, (M + 1) * d]``; ``query_weight`` and ``key_weight`` fp32
    ``[M, d]``; ``conv_weight`` ``[M, d]`` and ``taps`` ``[k, M, d]`` fp32, both None without a
    convolution; ``age`` int32 ``[B, T]``: how many positions it may look back; ``live`` bool ``[B, T]``. ``casts``:
    normed queries and keys, and all from them to the gate, are rounded to the streams' type.
    """
    if taps is None or conv_weight is None:
        shape = query_weight.shape
        conv_weight, taps, conv_eps = query_weight.new_empty(shape), query_weight.new_empty(0, *shape), 1.0
    out, alpha, *_ = _fuse(
        streams.contiguous(), keys_value.contiguous(), query_weight, key_weight, conv_weight, taps, age, live,
        gate_eps, conv_eps, dilation, copies_sign, casts,
    )  # fmt: skip
    return out, alpha


@torch.library.custom_op("torch_engram::fuse", mutates_args=())
def _fuse(
    streams: Tensor, keys_value: Tensor, query_weight: Tensor, key_weight: Tensor, conv_weight: Tensor, taps: Tensor,
    age: Tensor, live: Tensor | None, gate_eps: float, conv_eps: float, dilation: int, copies_sign: bool, casts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Streams, gates; r, inverse root mean squares of queries and keys, scores, q**(-1/2), each ``[B, T, M]``."""
    batch, length, branches, hidden = streams.shape
    tokens = batch * length
    out = torch.empty_like(streams)
    statistics = [torch.empty(streams.shape[:3], device=streams.device, dtype=torch.float32) for _ in range(6)]
    if tokens:
        _measure[(triton.cdiv(tokens, _ROWS),)](
            streams, keys_value, query_weight, key_weight, live, *statistics, tokens, gate_eps, conv_eps, hidden**0.5,
            M=branches, D=hidden, CASTS=casts and streams.dtype != torch.float32, SIGNED_ZERO=copies_sign,
            LIVE=live is not None, TOKENS=_ROWS, CHUNK=_chunk(hidden, _ROW_CHUNK), num_warps=_ROW_WARPS,
        )  # fmt: skip
        blocks, chunks, walk = _walk(tokens, branches, hidden, len(taps), dilation)
        _add[(blocks * chunks,)](
            streams, keys_value, *statistics[:2], taps * conv_weight, age, out, tokens, dilation, **walk
        )
    alpha, value_scale, query_rms, key_rms, score, value_rms = statistics
    return out, alpha, value_scale, query_rms, key_rms, score, value_rms


@_fuse.register_fake
def _(streams: Tensor, *others: Any) -> tuple[Tensor, ...]:
    statistics = (torch.empty(streams.shape[:3], device=streams.device, dtype=torch.float32) for _ in range(6))
    return torch.empty_like(streams), *statistics


@torch.library.custom_op("torch_engram::fuse_backward", mutates_args=())
def _fuse_backward(
    grad: Tensor, grad_alpha: Tensor, streams: Tensor, keys_value: Tensor, query_weight: Tensor, key_weight: Tensor,
    conv_weight: Tensor, taps: Tensor, age: Tensor, alpha: Tensor, value_scale: Tensor, query_rms: Tensor,
    key_rms: Tensor, score: Tensor, value_rms: Tensor, conv_eps: float, dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of streams, keys and value, and of the weights of queries, keys and convolution, and the taps."""
    batch, length, branches, hidden = streams.shape
    tokens, count = batch * length, len(taps)
    blocks, chunks, walk = _walk(tokens, branches, hidden, count, dilation)
    key_blocks, key_chunks = triton.cdiv(tokens, _BLOCK), triton.cdiv(hidden, _chunk(hidden, _CHUNK))
    fp32: dict[str, Any] = {"device": streams.device, "dtype": torch.float32}
    grad_streams, grad_keys_value = torch.empty_like(streams), torch.empty_like(keys_value)
    row_sums = torch.empty(chunks, 2, branches, tokens, **fp32)
    tap_sums = torch.empty(blocks, count, branches, hidden, **fp32)
    weight_sums = torch.empty(key_blocks, branches, hidden, **fp32)
    factors = [torch.empty(tokens, branches, **fp32) for _ in range(4)]
    if tokens:
        _value_gradients[(blocks * chunks,)](
            grad, keys_value, alpha, value_scale, taps * conv_weight, age, grad_keys_value, row_sums, tap_sums,
            tokens, dilation, **walk,
        )  # fmt: skip
        _gate_slopes[(triton.cdiv(tokens, _GATES), branches)](
            row_sums, grad_alpha, alpha, query_rms, key_rms, score, value_rms, *factors, tokens, chunks,
            conv_eps, hidden**-0.5, M=branches, D=hidden, TAPS=count, TOKENS=_GATES,
        )  # fmt: skip
        tile: dict[str, Any] = {"M": branches, "D": hidden, "TOKENS": _TOKENS, "CHUNK": _chunk(hidden, _CHUNK)}
        _key_gradients[(key_blocks * key_chunks * branches,)](
            grad, streams, keys_value, query_weight * key_weight, *factors[:3], grad_streams, grad_keys_value,
            weight_sums, tokens, BLOCK=_BLOCK, **tile,
        )  # fmt: skip
        if count:
            tiles = triton.cdiv(tokens, _TOKENS) * key_chunks
            _add_through_norm[(tiles,)](keys_value, factors[3], grad_keys_value, tokens, **tile)
    of_weight = weight_sums.sum(0)  # of the product of both weights: casts pass slopes on as they are
    of_taps = tap_sums.sum(0)  # of dz * r * v: both parameters of the convolution multiply it
    grad_conv = (of_taps * taps).sum(0) if count else torch.empty_like(conv_weight)
    grad_taps = of_taps * conv_weight if count else torch.empty_like(taps)
    return grad_streams, grad_keys_value, of_weight * key_weight, of_weight * query_weight, grad_conv, grad_taps


@_fuse_backward.register_fake
def _(
    grad: Tensor, grad_alpha: Tensor, streams: Tensor, keys_value: Tensor, query_weight: Tensor, key_weight: Tensor,
    conv_weight: Tensor, taps: Tensor, *others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = streams, keys_value, query_weight, key_weight, conv_weight, taps
    return tuple(torch.empty_like(like) for like in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, conv_eps, dilation, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.settings = conv_eps, dilation


def _backward(ctx: Any, grad: Tensor, grad_alpha: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grads = _fuse_backward(grad.contiguous(), grad_alpha.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return *grads, *[None] * 7


_fuse.register_autograd(_backward, setup_context=_save)


def _chunk(hidden: int, most: int) -> int:
    chunk: int = min(most, triton.next_power_of_2(hidden))
    return chunk


def _walk(tokens: int, branches: int, hidden: int, taps: int, dilation: int) -> tuple[int, int, dict[str, int]]:
    """How many blocks of rows and chunks of channels there are to walk, and the constants of the kernels that do."""
    padded, chunk = triton.next_power_of_2(branches), _chunk(hidden, _WALK_CHUNK)
    rows = max(1, _WALKERS // padded)
    constants = {
        "M": branches, "D": hidden, "TAPS": taps, "REACH": max(taps - 1, 0), "BRANCHES": padded, "STEPS": _STEPS,
        "ROWS": rows, "CHUNK": chunk, "STAGES": _STAGES, "num_warps": _WALK_WARPS * max(1, padded // _WALKERS),
    }  # fmt: skip
    blocks = triton.cdiv(triton.cdiv(tokens, _STEPS * dilation) * dilation, rows)
    return blocks, triton.cdiv(hidden, chunk), constants
