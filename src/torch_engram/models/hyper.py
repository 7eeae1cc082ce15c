"""Residual connections: the plain one, and manifold-constrained hyper-connections for M branches.

mHC, arXiv 2512.24880, section 4: a layer F reads one mixture of the branches and its output is spread over them,
while a doubly stochastic matrix mixes the branches themselves:

    x' = H_res x + H_post^T F(H_pre x),  H_pre = sigmoid(.), H_post = 2 sigmoid(.), H_res = Sinkhorn(exp(.))

Each argument is a learnt constant plus a small learnt function of the normed branches.
Shapes: B batch, T tokens, M branches, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_engram.kernels import use_kernels

Mixing = tuple[Tensor, ...]
"""H_res ``[B, T, M, M]`` and H_post ``[B, T, M]``; on a GPU also the streams. Nothing for one branch."""


_MOST_FUSED = 8
"""Most branches that the kernels hold in registers."""


class PlainResidual(nn.Module):
    """One branch: what a layer gives is added to what it read."""

    def read(self, streams: Tensor) -> tuple[Tensor, Mixing]:
        """``[B, T, d]`` from ``[B, T, 1, d]``."""
        return streams.squeeze(2), ()

    def write(self, streams: Tensor, output: Tensor, mixing: Mixing) -> Tensor:
        """``[B, T, 1, d]`` with ``output`` ``[B, T, d]`` added."""
        return streams + output.unsqueeze(2)


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """A doubly stochastic ``[..., M, M]``: exp(logits) with columns and rows divided by their sums, in turn.

    Rows come last and so sum to 1 exactly: where all branches are equal, mixing them changes nothing.
    """
    matrix = (logits - logits.amax((-2, -1), keepdim=True)).exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


def read_naive(
    streams: Tensor, weight: Tensor, strength: Tensor, static: Tensor, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre x ``[B, T, d]``, H_res ``[B, T, M, M]`` and H_post ``[B, T, M]`` of streams ``[B, T, M, d]``.

    With K = 2M + M^2 coefficients (pre, post, res row by row): ``weight`` is ``[K, M * d]``, ``static`` ``[K]``, and
    ``strength`` ``[3]``, one for each kind.
    """
    branches = streams.shape[2]
    parts = (branches, branches, branches * branches)
    flat = streams.flatten(2)
    normed = F.rms_norm(flat.float(), (flat.shape[-1],), eps=eps)
    with torch.autocast(streams.device.type, enabled=False):
        dynamic = F.linear(normed, weight.float()).split(parts, dim=-1)
    constant, gain = static.float().split(parts), strength.float()
    pre, post, res = (gain[i] * dynamic[i] + constant[i] for i in range(3))
    h_res = sinkhorn(res.unflatten(-1, (branches, branches)), iterations)
    read = (pre.sigmoid()[..., None] * streams.float()).sum(2).to(streams.dtype)
    return read, h_res, 2 * post.sigmoid()


def write_naive(streams: Tensor, output: Tensor, h_res: Tensor, h_post: Tensor) -> Tensor:
    """H_res x + H_post^T output, ``[B, T, M, d]``, from streams of that shape and an output ``[B, T, d]``."""
    # M is small: M weighted sums of branches are cheaper than a batch of B * T tiny matrix products.
    branches = range(streams.shape[2])
    mixed = sum((h_res[..., j, None] * streams[:, :, None, j].float() for j in branches), start=0.0)
    written: Tensor = mixed + h_post[..., None] * output.float()[:, :, None]
    return written.to(streams.dtype)


class HyperConnection(nn.Module):
    """M branches around one layer, mixed in fp32.

    A GPU runs the kernels of :mod:`torch_engram.models.hyper_fused`, other devices the functions above.
    """

    def __init__(self, branches: int, hidden: int, index: int, iterations: int, eps: float):
        super().__init__()
        self.branches, self.index, self.iterations, self.eps = branches, index, iterations, eps
        self.parts = (branches, branches, branches * branches)  # pre, post, res
        self.dynamic = nn.Linear(branches * hidden, sum(self.parts), bias=False)
        self.static = nn.Parameter(torch.empty(sum(self.parts)))
        self.strength = nn.Parameter(torch.empty(3))  # of the dynamic part in pre, post and res
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At the start the network computes what a plain pre-norm one does.

        All branches then hold the same, so H_pre must sum to 1, H_post be 1 and H_res have rows that sum to 1;
        the dynamic part is 0. H_pre gives each branch another weight, in another order in each layer: under equal
        weights all branches would get equal gradients and stay copies of each other.
        """
        share = (torch.arange(self.branches) - self.index) % self.branches + 1.0
        with torch.no_grad():
            pre, post, res = self.static.split(self.parts)
            pre.copy_(torch.logit(share / share.sum()))
            post.zero_()
            res.copy_((torch.eye(self.branches) * 4).flatten())
        nn.init.zeros_(self.dynamic.weight)
        nn.init.constant_(self.strength, 0.01)

    def read(self, streams: Tensor) -> tuple[Tensor, Mixing]:
        """What the layer reads, ``[B, T, d]``, and how its output will be written."""
        function: Callable[..., tuple[Tensor, ...]] = read_naive
        if self._fused(streams):
            from torch_engram.models.hyper_fused import read_fused as function
        read, *mixing = function(streams, self.dynamic.weight, self.strength, self.static, self.iterations, self.eps)
        return read, tuple(mixing)

    def write(self, streams: Tensor, output: Tensor, mixing: Mixing) -> Tensor:
        """``[B, T, M, d]``: the streams that were read, mixed, with ``output`` ``[B, T, d]`` spread over them."""
        h_res, h_post, *through = mixing
        if not through:
            return write_naive(streams, output, h_res, h_post)
        from torch_engram.models.hyper_fused import write_fused

        return write_fused(through[0], output, h_res, h_post)

    def _fused(self, streams: Tensor) -> bool:
        return use_kernels(streams) and self.branches <= _MOST_FUSED


def residual(branches: int, hidden: int, index: int, iterations: int, eps: float) -> PlainResidual | HyperConnection:
    """The residual connection of the ``index``-th layer of a network with M branches."""
    return PlainResidual() if branches == 1 else HyperConnection(branches, hidden, index, iterations, eps)
