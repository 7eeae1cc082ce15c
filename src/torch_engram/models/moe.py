"""Mixture of experts: many small routed experts, a shared one, and a load kept level without an auxiliary loss.

Routing follows DeepSeek-V3 (arXiv 2412.19437, section 2.1.2; the balance is arXiv 2408.15664): sigmoid scores,
the top k of score + bias are chosen, the chosen scores without the bias are normalised to sum to 1.
Shapes: n tokens (B * T), d hidden, k experts a token, f inner width of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_engram.kernels import use_kernels
from torch_engram.models.config import MoEConfig
from torch_engram.models.feedforward import SwiGLU
from torch_engram.models.grouped import as_autocast, grouped_product
from torch_engram.models.router import choose


class _Dispatch(torch.autograd.Function):
    """Token rows ``[n, d]`` copied into expert order ``[n * k, d]``; the way back is a gather, so without atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        rows = grads[0].index_select(0, inverse)
        return rows.view(-1, ctx.top_k, rows.shape[1]).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """Expert order ``[n * k, d]`` back to tokens ``[n, d]``, the k rows of a token added up."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return y.index_select(0, inverse).view(-1, top_k, y.shape[1]).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order // ctx.top_k), None, None, None


def moe_grouped(
    x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, shared: Tensor | None = None
) -> Tensor:
    """Sum over a token's experts of gate * expert(x), ``[n, d]``: tokens sorted by expert, two grouped products.

    ``x`` is ``[n, d]``, ``chosen`` (int64) and ``gates`` ``[n, k]``, ``gate_up`` ``[experts, d, 2f]`` and ``down``
    ``[experts, f, d]``; ``shared`` ``[n, d]`` is added. On a GPU, sorting, copying, activating and adding up are the
    kernels of :mod:`torch_engram.models.moe_fused`; elsewhere they are :func:`moe_sorted`. The products are the same.
    """
    if use_kernels(x):
        from torch_engram.models.moe_fused import moe_fused

        return moe_fused(x, chosen, gates, gate_up, down, shared)
    return moe_sorted(x, chosen, gates, gate_up, down, shared)


def moe_sorted(
    x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, shared: Tensor | None = None
) -> Tensor:
    """:func:`moe_grouped` in PyTorch's own operators, on any device."""
    top_k, experts = chosen.shape[1], gate_up.shape[0]
    flat = chosen.flatten()
    expert, order = flat.sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    ends = torch.searchsorted(expert, torch.arange(experts, device=x.device), right=True).to(torch.int32)
    rows = _Dispatch.apply(x, order, inverse, top_k)
    gate, up = grouped_product(rows, gate_up.to(rows.dtype), ends).chunk(2, dim=-1)
    # An expert's output is linear in its inner activations: the gate is applied there, where rows are narrower.
    inner = F.silu(gate) * up * gates.flatten()[order, None].to(rows.dtype)
    combined: Tensor = _Combine.apply(grouped_product(inner, down.to(rows.dtype), ends), order, inverse, top_k)
    return combined if shared is None else combined + shared


def moe_naive(x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What :func:`moe_grouped` computes, one expert after the other."""
    y = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert]).chunk(2, dim=-1)
        y = y.index_add(0, token, gates[token, slot, None] * ((F.silu(gate) * up) @ down[expert]))
    return y


class MoE(nn.Module):
    """Routed experts and a shared one in place of a dense feed-forward."""

    bias: Tensor
    load: Tensor

    def __init__(self, config: MoEConfig, hidden: int, layers: int):
        super().__init__()
        self.config, self.hidden, self.layers = config, hidden, layers
        experts, inner = config.experts, config.expert_hidden
        self.router = nn.Parameter(torch.empty(experts, hidden))
        self.gate_up = nn.Parameter(torch.empty(experts, hidden, 2 * inner))
        self.down = nn.Parameter(torch.empty(experts, inner, hidden))
        self.shared = SwiGLU(hidden, config.shared_hidden, layers) if config.shared_hidden else None
        self.register_buffer("bias", torch.zeros(experts))  # fp32: only ever added to scores, to choose
        self.register_buffer("load", torch.zeros(experts), persistent=False)  # tokens since the last update
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in :class:`SwiGLU`; routers start small, so that scores are near 1/2 and no expert leads."""
        nn.init.normal_(self.router, std=0.1 * self.hidden**-0.5)
        nn.init.normal_(self.gate_up, std=self.hidden**-0.5)
        nn.init.normal_(self.down, std=(2 * self.layers * self.config.expert_hidden) ** -0.5)

    def forward(self, x: Tensor, live: Tensor | None = None) -> Tensor:
        """``[B, T, d]`` from normed hidden states of that shape. In training, live tokens count in ``load``."""
        rows = x.flatten(0, 1)
        chosen, gates = self.route(rows)
        if self.training:
            self._count(chosen, live)
        shared = None if self.shared is None else self.shared(rows)
        return moe_grouped(as_autocast(rows), chosen, gates, self.gate_up, self.down, shared).view_as(x)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts (int64) and their gates (fp32), ``[n, k]``, for ``[n, d]``."""
        experts = self.config.experts
        with torch.autocast(rows.device.type, enabled=False):  # near ties must not depend on bf16
            # A GPU multiplies matrices of an odd size, say 29 experts, at a fraction of its speed.
            logits = F.linear(rows.float(), F.pad(self.router.float(), (0, 0, 0, -experts % 8)))[:, :experts]
        return choose(logits, self.bias, self.config.top_k)

    @torch.no_grad()
    def _count(self, chosen: Tensor, live: Tensor | None) -> None:
        if use_kernels(chosen):
            from torch_engram.models.moe_fused import count_fused

            self.load.add_(count_fused(chosen, live, self.config.experts))  # a recompute may run in a traced graph
            return
        ones = torch.ones_like(chosen, dtype=self.load.dtype)
        if live is not None:
            ones = ones * live.flatten()[:, None]
        self.load.scatter_add_(0, chosen.flatten(), ones.flatten())

    @torch.no_grad()
    def update_balance(self, rate: float) -> Tensor:
        """Move each expert's bias by ``rate`` towards the mean load and clear the count; call it once a step.

        Only the sign of (mean - load) enters: counting every token twice, as recompute does, changes nothing.
        Over several processes, sum ``load`` first. Returns the largest load over the mean (1 is level, 0 if none).
        """
        mean = self.load.mean()
        peak = self.load.max() / mean.clamp_min(1.0)
        self.bias += rate * torch.sign(mean - self.load)
        self.load.zero_()
        return peak
