"""Cross-entropy and its gradient in Triton, in place: the twin is ``turn_into_gradient_naive`` in ``loss.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.data import IGNORE_INDEX

_COLUMNS = 4096


def turn_into_gradient_triton(logits: Tensor, targets: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """Cross-entropies fp32 ``[n]`` of contiguous ``logits`` ``[n, V]`` and int64 ``targets`` ``[n]``.

    With a ``scale``, an fp32 scalar, the logits become that many times their gradients; ``bias`` is fp32 ``[V]``.
    """
    rows, width = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    _turn[(rows,)](
        logits, targets.contiguous(), logits if bias is None else bias.float(), losses,
        losses if scale is None else scale, width,
        NOBODY=IGNORE_INDEX, BIAS=bias is not None, TURN=scale is not None,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip
    return losses


@triton.jit
def _turn(
    logits, targets, bias, losses, scale, width,
    NOBODY: tl.constexpr, BIAS: tl.constexpr, TURN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * width
    target = tl.load(targets + row)
    wanted = target != NOBODY
    target = tl.where(wanted, target, 0)
    own = tl.load(line + target).to(tl.float32)  # before anything is written
    if BIAS:
        own += tl.load(bias + target)
    top, total = float("-inf"), 0.0
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(line + column, mask=column < width, other=float("-inf")).to(tl.float32)
        if BIAS:
            x += tl.load(bias + column, mask=column < width, other=0.0)
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        top = higher
    tl.store(losses + row, tl.where(wanted, (top - own) + tl.log(total), 0.0))
    if TURN:
        factor = tl.where(wanted, tl.load(scale), 0.0)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            x = tl.load(line + column, mask=column < width, other=float("-inf")).to(tl.float32)
            if BIAS:
                x += tl.load(bias + column, mask=column < width, other=0.0)
            grad = factor * (tl.exp(x - top) / total - tl.where(column == target, 1.0, 0.0))
            tl.store(line + column, grad.to(logits.dtype.element_ty), mask=column < width)
