"""The choice of experts from a router's logits: n tokens, E experts, k of them a token."""

from __future__ import annotations

from torch import Tensor

from torch_engram.kernels import use_kernels


def choose(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k experts (int64) whose sigmoid score + bias is largest, and their gates (fp32): ``[n, k]`` each.

    ``logits`` are fp32 ``[n, E]``, ``bias`` is ``[E]``. Gates are the chosen scores without the bias, over their sum.
    On a GPU this is one kernel each way (:mod:`torch_engram.models.router_fused`): there the lower expert wins a tie,
    elsewhere any may. What is not a number counts as largest.
    """
    if use_kernels(logits):
        from torch_engram.models.router_fused import choose_fused

        return choose_fused(logits, bias, top_k)
    return choose_naive(logits, bias, top_k)


def choose_naive(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """:func:`choose` in PyTorch's own operators, on any device."""
    scores = logits.sigmoid()
    chosen = (scores.detach() + bias).topk(top_k, dim=-1).indices
    gates = scores.gather(1, chosen)
    return chosen, gates / gates.sum(-1, keepdim=True)
