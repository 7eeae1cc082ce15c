"""The short causal convolution over gated values: each channel on its own, taps a dilation apart.

Shapes: B batch, T tokens, M branches, d hidden, k taps. Source: arXiv 2601.07372, section 2.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_engram.fusion.gate import branch_norm
from torch_engram.fusion.styles import FusionStyle
from torch_engram.window import Window


def document_age(doc_start: Tensor, before: Tensor | int = -1) -> Tensor:
    """How many positions ``[B, T]`` lie between each position and the start of its document, from bool ``[B, T]``.

    ``before`` (``[B, 1]``) is the age of the position before the first; -1 where the first starts a sequence.
    """
    position = torch.arange(doc_start.shape[1], device=doc_start.device)
    start = torch.where(doc_start, position, -1 - before).cummax(dim=1).values
    return position - start


def depthwise(x: Tensor, weight: Tensor, dilation: int, age: Tensor | None) -> Tensor:
    """y_t = sum over taps j of weight[j] * x_{t - (k-1-j) * dilation}, in fp32 ``[B, T, M, d]``.

    ``x`` ``[B, (k-1) * dilation + T, M, d]`` begins with what the first positions look back on; ``weight`` is
    ``[k, M, d]``, oldest tap first. With ``age`` ``[B, T]`` no tap reaches past the start of its document.
    """
    taps = weight.shape[0]
    tokens = x.shape[1] - (taps - 1) * dilation
    weight = weight.float()
    y = x[:, (taps - 1) * dilation :] * weight[-1]
    for tap in range(taps - 1):
        back = (taps - 1 - tap) * dilation
        seen = x[:, tap * dilation : tap * dilation + tokens]
        if age is not None:
            seen = seen * (age >= back)[:, :, None, None]
        y = y + seen * weight[tap]
    return y


class ShortConvolution(nn.Module):
    """SiLU(depthwise(RMSNorm(u))), zero at the start."""

    def __init__(self, branches: int, hidden: int, taps: int, dilation: int, style: FusionStyle):
        super().__init__()
        self.style, self.dilation, self.reach = style, dilation, (taps - 1) * dilation
        self.norm_weight = nn.Parameter(torch.empty(branches, hidden))
        self.weight = nn.Parameter(torch.empty(taps, branches, hidden))  # oldest tap first
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero taps: the module starts as Y = u. Their gradient is not zero (the slope of SiLU at 0 is 1/2)."""
        nn.init.constant_(self.norm_weight, self.style.unit_weight)
        nn.init.zeros_(self.weight)

    def forward(self, u: Tensor, dtype: torch.dtype, doc_start: Tensor | None, window: Window | None) -> Tensor:
        """fp32 ``[B, T, M, d]`` from gated values ``u`` of that shape; normed values are kept in ``dtype``."""
        x = self.normed(u, dtype)
        age = None
        if window is not None:
            x, age = self._join(x, doc_start, window)
        elif doc_start is not None and not self.style.conv_crosses_documents:
            age = document_age(doc_start)
        x = F.pad(x, (0, 0, 0, 0, self.reach + u.shape[1] - x.shape[1], 0))  # before a sequence there is nothing
        return F.silu(depthwise(x, self.weight, self.dilation, age))

    def normed(self, u: Tensor, dtype: torch.dtype) -> Tensor:
        """What the taps are laid on ``[B, T, M, d]``."""
        return branch_norm(u, self.norm_weight.float() + self.style.weight_offset, self.style.conv_eps).to(dtype)

    def _join(self, x: Tensor, doc_start: Tensor | None, window: Window) -> tuple[Tensor, Tensor | None]:
        """The window's positions and these, and the age of these; the window then moves on."""
        if doc_start is None:
            doc_start = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        held = window.last()
        age = document_age(doc_start, held[1][:, -1:] if held else -1)
        joined = torch.cat((held[0], x), dim=1) if held else x
        window.push(x, age)
        return joined, None if self.style.conv_crosses_documents else age
