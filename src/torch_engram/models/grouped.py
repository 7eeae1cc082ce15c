"""One matrix product per group of rows, in every dtype and under ``torch.compile``.

``F.grouped_mm`` runs in fp32, but torch 2.13 traces it in bf16 only. Outside bf16 it is called through an operator
of our own, which says its shapes and its gradient itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def as_autocast(x: Tensor) -> Tensor:
    """``x`` in autocast's type where autocast is on, which knows ``F.linear`` but not grouped products."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``[n, f]``: rows of ``x`` ``[n, d]``, sorted by group, times their group's ``weight``, ``[groups, d, f]``.

    ``ends`` (int32 ``[groups]``) is the row after each group's last. d and f must be multiples of 16 bytes.
    """
    if x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight, offs=ends)
    product: Tensor = _product(x, weight, ends)
    return product


@torch.library.custom_op("torch_engram::grouped_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight, offs=ends)


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("torch_engram::grouped_weight_grad", mutates_args=())
def _weight_grad(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """``[groups, d, f]``: each group's x^T grad."""
    return F.grouped_mm(x.t(), grad, offs=ends)


@_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], grad.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()  # an expanded gradient has strides that grouped products refuse
    return _product(grad, weight.transpose(1, 2), ends), _weight_grad(x, grad, ends), None


_product.register_autograd(_backward, setup_context=_save)
