"""One block of the decoder: memory at the entry, then attention, then feed-forward.

Shapes: B batch, T tokens, E embedding width, M branches, d hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from torch_engram.fusion.engram import Engram, EngramState
from torch_engram.models.attention import Attention, KVCache
from torch_engram.models.config import DecoderConfig
from torch_engram.models.feedforward import SwiGLU
from torch_engram.models.hyper import residual
from torch_engram.models.layout import Layout
from torch_engram.models.moe import MoE
from torch_engram.models.norm import RMSNorm


@dataclass(frozen=True)
class BlockState:
    """What one block remembers between calls."""

    kv: KVCache
    engrams: dict[str, EngramState]


class Block(nn.Module):
    """A pre-norm transformer block with the Engrams of its layer."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        mixing = (config.sinkhorn_iterations, config.norm_eps)
        moe = config.moe_at(layer)
        self.engrams = nn.ModuleDict({name: Engram(engram) for name, engram in config.engrams_at(layer).items()})
        self.attention_residual = residual(config.branches, config.hidden, 2 * layer, *mixing)
        self.attention_norm = RMSNorm(config.hidden, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_residual = residual(config.branches, config.hidden, 2 * layer + 1, *mixing)
        self.ffn_norm = RMSNorm(config.hidden, eps=config.norm_eps)
        self.ffn = (
            MoE(moe, config.hidden, config.layers)
            if moe is not None
            else SwiGLU(config.hidden, config.ffn_hidden, config.layers)
        )

    def new_state(self, drafts: int = 0) -> BlockState:
        """An empty state for decoding."""
        engrams = {
            name: module.new_state(drafts) for name, module in self.engrams.items() if isinstance(module, Engram)
        }
        return BlockState(KVCache(), engrams)

    def forward(
        self,
        streams: Tensor,
        layout: Layout,
        memory: Mapping[str, Tensor],
        live: Tensor | None = None,
        doc_start: Tensor | None = None,
        state: BlockState | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Streams ``[B, T, M, d]`` and the gates ``[B, T, M]`` of each Engram; ``memory`` is name -> ``[B, T, E]``."""
        gates = {}
        for name, engram in self.engrams.items():
            streams, gates[name] = engram(
                streams,
                memory[name],
                live=live,
                doc_start=doc_start,
                state=state.engrams[name] if state is not None else None,
                return_gates=True,
            )
        x, mixing = self.attention_residual.read(streams)
        x = self.attention(self.attention_norm(x), layout, state.kv if state is not None else None)
        streams = self.attention_residual.write(streams, x, mixing)
        x, mixing = self.ffn_residual.read(streams)
        x = self.ffn_norm(x)
        x = self.ffn(x, live) if isinstance(self.ffn, MoE) else self.ffn(x)
        return self.ffn_residual.write(streams, x, mixing), gates
