"""Other ways to use n-gram tables than the gated one, to compare it with: modules in an Engram's place in a block.

They are naive, compiled with the block they are in, and have an Engram's call. Shapes: B batch, T tokens, M branches, d
hidden, E embedding width, which is that of all orders and heads side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_engram.addressing import layouts
from torch_engram.config import EngramConfig, nearest
from torch_engram.models import Decoder, DecoderConfig
from torch_engram.models.block import Block
from torch_engram.models.norm import RMSNorm
from torch_engram.train import Recipe
from torch_engram.train.build import build_decoder


class _Way(nn.Module, ABC):
    """Streams become what :meth:`mixed` makes of them and of embeddings."""

    def __init__(self, config: EngramConfig):
        super().__init__()
        self.out = _linear(config.embedding_dim, config.hidden)

    def forward(
        self, streams: Tensor, embeddings: Tensor, *, live: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Streams ``[B, T, M, d]`` with the memory, and gates of 1, ``[B, T, M]``."""
        embeddings = embeddings.to(self.out.weight.dtype)
        if live is not None:
            embeddings = embeddings * live[..., None]
        mixed = self.mixed(streams.float(), embeddings).to(streams.dtype)
        return mixed, torch.ones(streams.shape[:3], device=streams.device)

    @abstractmethod
    def mixed(self, streams: Tensor, embeddings: Tensor) -> Tensor:
        """Streams with the memory, fp32."""


class Addition(_Way):
    """``h + W e``, without a gate: as in the speed runs of small models (modded-nanogpt #360)."""

    def mixed(self, streams: Tensor, embeddings: Tensor) -> Tensor:
        """See :class:`_Way`."""
        added: Tensor = self.out(embeddings)
        return streams + added.unsqueeze(2)


class OverEncoding(_Way):
    """``(h + sum over orders of W_n e_n) / N`` at the entry of block 0, where h is the token's own embedding: the mean
    of the embeddings of orders 1 to N, after the Over-Tokenized Transformer (arXiv 2501.16975)."""

    def __init__(self, config: EngramConfig):
        super().__init__(config)
        if config.layers != (0,):
            raise ValueError(f"Over-encoding is done at the input: set layers to (0,) for {config.layers}.")
        self._orders = config.max_ngram

    def mixed(self, streams: Tensor, embeddings: Tensor) -> Tensor:
        """See :class:`_Way`; one product of all orders side by side is the sum of theirs."""
        added: Tensor = self.out(embeddings)
        return (streams + added.unsqueeze(2)) / self._orders


class PerLayer(_Way):
    """``h + RMSNorm(W_out (gelu(W_down h) * e))``: a layer's own embeddings, in the form of Gemma 3n's of tokens. Those
    are added at a block's end and have a projection of the token's embedding beside them; here they stand where Engrams
    do, at its entry, and alone. Raises ``ValueError`` for rows that begin at zero, where the norm's gradient is some
    thousandfold."""

    def __init__(self, config: EngramConfig):
        super().__init__(config)
        if config.init_std == 0:
            raise ValueError("Per-layer embeddings are normed, so rows must not begin at zero: set init_std=0.02, say.")
        self.down = _linear(config.hidden, config.embedding_dim)
        self.norm = RMSNorm(config.hidden, eps=1e-6)

    def mixed(self, streams: Tensor, embeddings: Tensor) -> Tensor:
        """See :class:`_Way`."""
        chosen = F.gelu(self.down(streams.to(self.down.weight.dtype)), approximate="tanh") * embeddings.unsqueeze(2)
        added: Tensor = self.norm(self.out(chosen))
        return streams + added.float()


WAYS: dict[str, type[_Way]] = {"addition": Addition, "over-encoding": OverEncoding, "per-layer": PerLayer}


def build_way(way: str, recipe: Recipe, config: DecoderConfig) -> Decoder:
    """A decoder whose memories are used in another way. Raises ``ValueError`` for an unknown one."""
    if way not in WAYS:
        raise ValueError(f"There is no way {way!r} to use n-grams: {nearest(way, WAYS)}")
    decoder = build_decoder(recipe, config)
    torch.manual_seed(recipe.seed)
    for layer, block in enumerate(decoder.blocks):
        assert isinstance(block, Block)
        for name, engram in config.engrams_at(layer).items():
            block.engrams[name] = WAYS[way](engram).to(recipe.device)
    return decoder


def with_rows(engram: EngramConfig, rows: int) -> EngramConfig:
    """With so many rows in all its tables, as nearly as may be: heads have primes of their own, near what is asked."""
    asked = rows / sum(engram.per_order("heads")) / len(engram.layers)
    for _ in range(4):
        engram = replace(engram, rows_per_head=max(2, round(asked)))
        asked *= rows / sum(layout.rows for layout in layouts(engram).values())
    return engram


def _linear(width: int, hidden: int) -> nn.Linear:
    """As an Engram's projections begin: what they map keeps its size."""
    linear = nn.Linear(width, hidden, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear
