"""The head and its loss in one: cross-entropy from hidden states, a chunk of tokens at a time.

Logits ``[n, V]`` are by far the largest tensor of a small model's step, and nobody needs them but the loss. Here those
of one chunk are computed, turned into their own gradient in place, and used up. n tokens, V vocabulary, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_engram.data import IGNORE_INDEX
from torch_engram.kernels import use_kernels
from torch_engram.models.grouped import as_autocast

_CHUNK_LOGITS = 1 << 27
"""Most logits that are held at once."""


def head_loss_naive(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """What :func:`head_loss` computes with ``divisor`` 1, from logits that are held whole."""
    logits = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)).float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, divisor: Tensor | None = None
) -> Tensor:
    """Sum of all tokens' cross-entropies over ``divisor``: an fp32 scalar with gradients for ``hidden`` and ``weight``.

    ``hidden`` is ``[..., d]``, ``weight`` ``[V, d]``, ``targets`` int64 ``[...]``, IGNORE_INDEX where there is none,
    and ``bias`` ``[V]`` a constant that is added to the logits. ``divisor`` is an fp32 scalar beside them, so that a
    captured graph reads each step's own; None is 1. Products have autocast's type, sums and the weight's gradient are
    fp32. The gradients are computed on the way there; the way back only scales them.
    """
    divisor = torch.ones((), device=hidden.device) if divisor is None else divisor
    loss: Tensor = _HeadLoss.apply(hidden.flatten(0, -2), weight, targets.flatten(), bias, divisor)
    return loss


@torch.no_grad()
def head_losses(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Every token's cross-entropy, fp32 ``[...]`` and 0 without a target; without gradients, shapes as above."""
    flat, found = hidden.flatten(0, -2), targets.flatten()
    losses = torch.empty(found.shape, device=found.device)
    for part, _, logits in _chunks(as_autocast(flat), weight):
        losses[part] = turn_into_gradient(logits, found[part], bias, None)
    return losses.view(targets.shape)


def turn_into_gradient_naive(
    logits: Tensor, targets: Tensor, bias: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropies fp32 ``[n]``, and ``scale`` times their gradients ``[n, V]``, of logits ``[n, V]`` + bias."""
    whole = logits.float() if bias is None else logits.float() + bias.float()
    losses = F.cross_entropy(whole, targets, ignore_index=IGNORE_INDEX, reduction="none")
    gradient = whole.softmax(-1)
    wanted = targets != IGNORE_INDEX
    gradient[torch.arange(len(targets), device=targets.device), torch.where(wanted, targets, 0)] -= 1
    return losses, (gradient * (wanted * scale)[:, None]).to(logits.dtype)


def turn_into_gradient(logits: Tensor, targets: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """The cross-entropies; ``logits`` become ``scale`` (a scalar) times their gradients, or stay as they are without
    one."""
    if use_kernels(logits):
        from torch_engram.train.loss_kernels import turn_into_gradient_triton

        return turn_into_gradient_triton(logits, targets, bias, scale)
    if scale is None:
        whole = logits.float() if bias is None else logits.float() + bias.float()
        return F.cross_entropy(whole, targets, ignore_index=IGNORE_INDEX, reduction="none")
    losses, gradient = turn_into_gradient_naive(logits, targets, bias, scale)
    logits.copy_(gradient)
    return losses


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tokens of a chunk, their hidden states, and their logits in the hidden states' type."""
    tokens = max(1, _CHUNK_LOGITS // weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        narrow = weight.to(hidden.dtype)
        for start in range(0, hidden.shape[0], tokens):
            part = slice(start, start + tokens)
            yield part, hidden[part], hidden[part] @ narrow.t()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, divisor: Tensor
    ) -> Tensor:
        narrow = as_autocast(hidden)
        learns = any(ctx.needs_input_grad[:2])
        losses = torch.empty(targets.shape, device=targets.device)
        if learns:
            grad_hidden = torch.empty_like(narrow)
            grad_weight = torch.zeros(weight.shape, device=weight.device)
            narrow_weight = weight.to(narrow.dtype)
        for part, states, logits in _chunks(narrow, weight):
            losses[part] = turn_into_gradient(logits, targets[part], bias, 1 / divisor if learns else None)
            if learns:
                with torch.autocast(hidden.device.type, enabled=False):
                    torch.mm(logits, narrow_weight, out=grad_hidden[part])
                    _add_product(grad_weight, logits.t(), states)
        if learns:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.types = hidden.dtype, weight.dtype
        return losses.sum() / divisor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = ((saved * grads[0]).to(kind) for saved, kind in zip(ctx.saved_tensors, ctx.types, strict=True))
        return *scaled, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to total, summed in fp32 whatever the factors' type."""
    if left.dtype != torch.float32 and left.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        total.addmm_(left.float(), right.float())
