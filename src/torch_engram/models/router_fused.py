"""The choice of experts on a GPU as one operator each way, which compilers and recompute see whole.

Nothing of the size of the logits is kept for the way back, which needs the chosen scores alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_engram.models.router_kernels import choose_backward_triton, choose_triton


def choose_fused(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """As :func:`torch_engram.models.router.choose`; the lower expert wins a tie."""
    chosen, gates, _ = _choose(logits.contiguous(), bias.contiguous(), top_k)
    return chosen, gates


@torch.library.custom_op("torch_engram::choose", mutates_args=())
def _choose(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    return choose_triton(logits, bias, top_k)


@_choose.register_fake
def _(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, ...]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape), logits.new_empty(shape)


@torch.library.custom_op("torch_engram::choose_backward", mutates_args=())
def _choose_backward(grad: Tensor, chosen: Tensor, scores: Tensor, experts: int) -> Tensor:
    return choose_backward_triton(grad, chosen, scores, experts)


@_choose_backward.register_fake
def _(grad: Tensor, chosen: Tensor, scores: Tensor, experts: int) -> Tensor:
    return scores.new_empty(scores.shape[0], experts)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # nobody uses the scores that are handed out for the way back
    ctx.experts = inputs[0].shape[1]
    ctx.save_for_backward(output[0], output[2])


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = grads[1]
    return None if grad is None else _choose_backward(grad.contiguous(), *ctx.saved_tensors, ctx.experts), None, None


_choose.register_autograd(_differentiate, setup_context=_save)
