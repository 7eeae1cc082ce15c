"""The Engram module: looked-up embeddings, gated by the hidden state, added to the residual stream.

    k^(m) = W_K^(m) e        v = W_V e
    alpha^(m) = sigmoid(signed root of <RMSNorm(h^(m)), RMSNorm(k^(m))> / sqrt(d))
    u^(m) = alpha^(m) v      h = h + u + SiLU(conv(RMSNorm(u)))

Shapes: B batch, T tokens, E embedding width, M branches, d hidden. No table, token or lookup is known here.
Source: arXiv 2601.07372, section 2.3; what the releases do differently is in :mod:`torch_engram.fusion.styles`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_engram.config import EngramConfig
from torch_engram.fusion.convolution import ShortConvolution, document_age
from torch_engram.fusion.decoding import can_fuse_step, fuse_step
from torch_engram.fusion.fp8 import fp8_linear
from torch_engram.fusion.gate import gate
from torch_engram.fusion.styles import STYLES
from torch_engram.kernels import use_kernels
from torch_engram.window import Window


class EngramState(Window):
    """What one Engram remembers between calls: the convolution's last inputs and their ages in their documents."""


class Engram(nn.Module):
    """Adds gated memory to the residual streams, at a block's entry.

    ``fp8`` computes ``[W_K | W_V] e`` and its gradients in FP8 (:func:`torch_engram.fusion.fp8.fp8_linear`). It changes
    no parameter, and may be set at any time.

    >>> engram = Engram(EngramConfig(layers=(1,), hidden=64, vocab_size=1000, heads=2, row_dim=16))
    >>> engram(torch.randn(2, 5, 1, 64), torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 1, 64])
    """

    def __init__(self, config: EngramConfig, *, fp8: bool = False):
        super().__init__()
        self.config, self.fp8 = config, fp8
        self.style = STYLES[config.fusion]
        branches, hidden = config.branches, config.hidden
        self.wkv = nn.Linear(config.embedding_dim, (branches + 1) * hidden, bias=config.bias)  # M keys, then the value
        self.query_weight = nn.Parameter(torch.empty(branches, hidden))
        self.key_weight = nn.Parameter(torch.empty(branches, hidden))
        self.convolution = (
            ShortConvolution(branches, hidden, config.conv_kernel, config.conv_dilation, self.style)
            if config.conv_kernel
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W_V keeps the size of what it maps, and the zero start is left to the rows: rows and W_V both zero would
        have no gradient at all. Keys are normed, so the size of W_K only sets how fast it turns; it is the same."""
        nn.init.normal_(self.wkv.weight, std=self.config.embedding_dim**-0.5)
        if self.wkv.bias is not None:
            nn.init.zeros_(self.wkv.bias)
        nn.init.constant_(self.query_weight, self.style.unit_weight)
        nn.init.constant_(self.key_weight, self.style.unit_weight)
        if self.convolution is not None:
            self.convolution.reset_parameters()

    def new_state(self, drafts: int = 0) -> EngramState:
        """An empty state for decoding, from which the last ``drafts`` positions can be taken back."""
        return EngramState(self.convolution.reach if self.convolution is not None else 0, drafts)

    def forward(
        self,
        streams: Tensor,
        embeddings: Tensor,
        *,
        live: Tensor | None = None,
        doc_start: Tensor | None = None,
        state: EngramState | None = None,
        return_gates: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Streams with the memory added, ``[B, T, M, d]``; with ``return_gates`` also the gates, fp32 ``[B, T, M]``.

        ``streams`` is ``[B, T, M, d]``, ``embeddings`` ``[B, T, E]`` of any floating type. Where ``live`` (bool
        ``[B, T]``) is False nothing is added and the gate is 0. ``doc_start`` (bool ``[B, T]``) is True at a
        document's first position. ``state`` carries the convolution over calls and is advanced; no gradient flows
        through it. The sum is taken in fp32 and rounded once. Raises ``ValueError`` for shapes that do not fit the
        configuration.
        """
        self._check(streams, embeddings)
        if not torch.is_autocast_enabled(embeddings.device.type):  # which would choose the type itself
            embeddings = embeddings.to(self.wkv.weight.dtype)
        wkv = self.wkv
        keys_value = fp8_linear(embeddings, wkv.weight, wkv.bias) if self.fp8 else wkv(embeddings)
        if state is not None and self._is_step(streams, state):
            streams, alpha = fuse_step(self, streams, keys_value, live, doc_start, *state.advance())
        elif use_kernels(streams) and (state is None or not len(state)):
            streams, alpha = self.fuse_triton(streams, keys_value, live, doc_start)
            if state is not None and self.convolution is not None:
                self._remember(keys_value, alpha, streams.dtype, doc_start, state)
        else:
            streams, alpha = self.fuse_naive(streams, keys_value, live, doc_start, state)
        return (streams, alpha) if return_gates else streams

    def fuse_naive(
        self,
        streams: Tensor,
        keys_value: Tensor,
        live: Tensor | None = None,
        doc_start: Tensor | None = None,
        state: EngramState | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All that follows the matrix product, ``keys_value`` ``[B, T, (M + 1) * d]``, as in the formula above."""
        keys_value = keys_value.unflatten(-1, (self.config.branches + 1, self.config.hidden))
        keys, value = keys_value[:, :, :-1], keys_value[:, :, -1:]  # [B, T, M, d], [B, T, 1, d]
        alpha = gate(streams, keys, self.query_weight, self.key_weight, self.style)  # [B, T, M]
        if live is not None:
            alpha = alpha * live[:, :, None]
        u = alpha[..., None] * value
        added = u.float()
        if self.convolution is not None:
            added = added + self.convolution(u, streams.dtype, doc_start, state)
        return (streams.float() + added).to(streams.dtype), alpha.float()

    def _is_step(self, streams: Tensor, state: EngramState) -> bool:
        """Whether ``state`` has all that the convolution of one position sees, and nobody wants a gradient."""
        whole = self.convolution is not None and len(state) == self.convolution.reach
        alone = whole and streams.shape[:2] == (state.sequences, 1) and not torch.is_grad_enabled()
        return alone and can_fuse_step(streams)

    def _remember(
        self, keys_value: Tensor, alpha: Tensor, dtype: torch.dtype, doc_start: Tensor | None, state: EngramState
    ) -> None:
        """Let an empty ``state`` have what it keeps of these positions, whose gates are ``alpha`` ``[B, T, M]``."""
        assert self.convolution is not None
        kept = slice(-(state.keep + state.drafts + 1), None)  # one more, so that it knows that it has let some go
        value = keys_value[:, kept, -self.config.hidden :].unsqueeze(2)
        starts = torch.zeros_like(alpha[:, :, 0], dtype=torch.bool) if doc_start is None else doc_start
        u = alpha[:, kept, :, None] * value
        state.push(self.convolution.normed(u, dtype), document_age(starts)[:, kept])

    def fuse_triton(
        self, streams: Tensor, keys_value: Tensor, live: Tensor | None = None, doc_start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`fuse_naive`, in two passes over memory forward and four back."""
        from torch_engram.fusion.fused import fuse_triton

        style, convolution = self.style, self.convolution
        if doc_start is None or style.conv_crosses_documents:
            age = torch.arange(streams.shape[1], device=streams.device).repeat(len(streams), 1)
        else:
            age = document_age(doc_start)
        return fuse_triton(
            streams,
            keys_value,
            self.query_weight.float() + style.weight_offset,
            self.key_weight.float() + style.weight_offset,
            None if convolution is None else convolution.norm_weight.float() + style.weight_offset,
            None if convolution is None else convolution.weight.float(),
            age=age.int(),
            live=live,
            gate_eps=style.gate_eps,
            conv_eps=style.conv_eps,
            dilation=self.config.conv_dilation,
            copies_sign=style.copies_sign,
            casts=style.casts_after_norms,
        )

    def _check(self, streams: Tensor, embeddings: Tensor) -> None:
        config = self.config
        if streams.shape[2:] != (config.branches, config.hidden):
            raise ValueError(
                f"Streams of shape {tuple(streams.shape)} do not fit this Engram: "
                f"give [B, T, {config.branches}, {config.hidden}]."
            )
        if embeddings.shape != (*streams.shape[:2], config.embedding_dim):
            raise ValueError(
                f"Embeddings of shape {tuple(embeddings.shape)} do not fit this Engram: "
                f"give {[*streams.shape[:2], config.embedding_dim]}, the rows of each position side by side."
            )
