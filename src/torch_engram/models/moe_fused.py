"""Mixture of experts on a GPU: the operators around the grouped products, which compilers see whole.

Each calls the kernels of :mod:`torch_engram.models.moe_kernels` and says its shapes and its gradient itself. What moves
bytes: rows are copied into expert order once each way, the activation is one pass each way (and saves nothing that
it can compute again), and the k rows of a token are added up, the shared expert's among them, in one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_engram.models.grouped import grouped_product
from torch_engram.models.moe_kernels import (
    activate_backward_triton,
    activate_triton,
    collect_triton,
    count_triton,
    order_triton,
    spread_triton,
)


def moe_fused(
    x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, shared: Tensor | None = None
) -> Tensor:
    """As :func:`torch_engram.models.moe.moe_grouped`."""
    order, inverse, ends = _order(chosen.contiguous(), gate_up.shape[0])
    rows = _spread(x.contiguous(), inverse)
    inner = grouped_product(rows, gate_up.to(rows.dtype), ends).contiguous()
    inner = _activate(inner, gates.float().contiguous(), order)
    rows = grouped_product(inner, down.to(rows.dtype), ends).contiguous()
    total: Tensor = _collect(rows, inverse, None if shared is None else shared.contiguous())
    return total


def count_fused(chosen: Tensor, live: Tensor | None, experts: int) -> Tensor:
    """fp32 ``[experts]``: how many of the tokens, or of ``live`` ones (bool), chose each; ``chosen`` is ``[n, k]``."""
    counts: Tensor = _count(chosen.contiguous(), None if live is None else live.flatten().to(torch.int8), experts)
    return counts


@torch.library.custom_op("torch_engram::expert_count", mutates_args=())
def _count(chosen: Tensor, live: Tensor | None, experts: int) -> Tensor:
    return count_triton(chosen, live, experts)


@_count.register_fake
def _(chosen: Tensor, live: Tensor | None, experts: int) -> Tensor:
    return chosen.new_empty(experts, dtype=torch.float32)


@torch.library.custom_op("torch_engram::expert_order", mutates_args=())
def _order(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return order_triton(chosen, experts)


@_order.register_fake
def _(chosen: Tensor, experts: int) -> tuple[Tensor, ...]:
    shapes = ((chosen.numel(),), chosen.shape, (experts,))
    return tuple(chosen.new_empty(shape, dtype=torch.int32) for shape in shapes)


@torch.library.custom_op("torch_engram::expert_spread", mutates_args=())
def _spread(x: Tensor, inverse: Tensor) -> Tensor:
    return spread_triton(x, inverse)


@_spread.register_fake
def _(x: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(inverse.numel(), x.shape[1])


@torch.library.custom_op("torch_engram::expert_collect", mutates_args=())
def _collect(rows: Tensor, inverse: Tensor, added: Tensor | None) -> Tensor:
    return collect_triton(rows, inverse, added)


@_collect.register_fake
def _(rows: Tensor, inverse: Tensor, added: Tensor | None) -> Tensor:
    return rows.new_empty(inverse.shape[0], rows.shape[1])


@torch.library.custom_op("torch_engram::expert_activate", mutates_args=())
def _activate(gate_up: Tensor, gates: Tensor, order: Tensor) -> Tensor:
    return activate_triton(gate_up, gates, order)


@_activate.register_fake
def _(gate_up: Tensor, gates: Tensor, order: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("torch_engram::expert_activate_backward", mutates_args=())
def _activate_backward(grad: Tensor, gate_up: Tensor, gates: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    return activate_backward_triton(grad, gate_up, gates, order)


@_activate_backward.register_fake
def _(grad: Tensor, gate_up: Tensor, gates: Tensor, order: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(gate_up), torch.empty_like(gates)


def _save_inverse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    added = inputs[2] if len(inputs) == 3 else None
    ctx.added = None if added is None else added.dtype


def _differentiate_spread(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _collect(grad.contiguous(), *ctx.saved_tensors, None), None


def _differentiate_collect(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _spread(grad.contiguous(), *ctx.saved_tensors), None, None if ctx.added is None else grad.to(ctx.added)


def _save_all(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_activate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_activate_backward(grad.contiguous(), *ctx.saved_tensors), None


_spread.register_autograd(_differentiate_spread, setup_context=_save_inverse)
_collect.register_autograd(_differentiate_collect, setup_context=_save_inverse)
_activate.register_autograd(_differentiate_activate, setup_context=_save_all)
