"""The shape of a decoder as one frozen value: widths, layers, experts, branches and the memories at its layers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torch_engram.config import EngramConfig, checked_fields, need


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts feed-forwards: fine-grained routed experts beside a shared one that every token passes."""

    experts: int
    """Routed experts of a layer."""
    top_k: int
    """Routed experts that a token passes."""
    expert_hidden: int
    """Inner width of one routed expert; a multiple of 8, as grouped matrix products want aligned rows."""
    shared_hidden: int = 0
    """Inner width of the shared expert; 0 for none. (n shared experts of width w are one of width n * w.)"""
    dense_layers: int = 0
    """The first layers that keep a dense feed-forward."""

    def __post_init__(self) -> None:
        need(self, self.experts >= 1, "experts", "a layer needs at least 1 routed expert.")
        need(self, 1 <= self.top_k <= self.experts, "top_k", f"choose 1 to {self.experts} (experts).")
        aligned = self.expert_hidden >= 8 and self.expert_hidden % 8 == 0
        need(self, aligned, "expert_hidden", "use a multiple of 8, for the grouped matrix products.")
        need(self, self.shared_hidden >= 0, "shared_hidden", "use 0 for none, or a width.")
        need(self, self.dense_layers >= 0, "dense_layers", "use 0 or the number of leading dense layers.")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer: pre-norm, grouped-query attention with QK-norm and RoPE, SwiGLU.

    Raises ``ValueError`` naming the field and the mend.
    """

    vocab_size: int
    """Rows of the token embedding and the head; may be padded beyond the tokenizer, see ``real_vocab``."""
    hidden: int
    """d: width of one residual branch."""
    layers: int
    """Blocks."""
    heads: int
    """Query heads."""
    ffn_hidden: int
    """Inner width of the dense feed-forwards."""
    kv_heads: int | None = None
    """Key and value heads; ``heads`` where not given."""
    head_dim: int | None = None
    """Width of one head, even; ``hidden / heads`` where not given."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-6
    """Added to the mean square under every norm's root."""
    tie_embeddings: bool = True
    """Whether the head shares the token embedding's weight."""
    real_vocab: int | None = None
    """Ids of the tokenizer, where ``vocab_size`` is padded: the logits of later ids are masked."""
    moe: MoEConfig | None = None
    """Mixture of experts in place of the dense feed-forwards."""
    branches: int = 1
    """M: residual branches, joined by hyper-connections where more than 1."""
    sinkhorn_iterations: int = 20
    """Iterations that make the branches' mixing matrix doubly stochastic."""
    engrams: dict[str, EngramConfig] = field(default_factory=dict)
    """The memories by name. Each has its own tables, layers and fusion; a layer may have several."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.heads if self.kv_heads is None else self.kv_heads)
        for name in ("vocab_size", "hidden", "layers", "heads", "kv_heads", "ffn_hidden", "branches"):
            need(self, getattr(self, name) >= 1, name, "it must be at least 1.")
        if self.head_dim is None:
            divides = self.hidden % self.heads == 0
            need(self, divides, "heads", f"it must divide hidden ({self.hidden}), or set head_dim.")
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        object.__setattr__(self, "engrams", dict(self.engrams))
        self._check()

    def _check(self) -> None:
        assert self.kv_heads is not None and self.head_dim is not None
        even = self.head_dim >= 2 and self.head_dim % 2 == 0
        need(self, even, "head_dim", "rotary embedding turns pairs, so use an even number.")
        need(self, self.heads % self.kv_heads == 0, "kv_heads", f"it must divide heads ({self.heads}).")
        need(self, self.rope_theta > 0, "rope_theta", "it must be positive.")
        need(self, self.sinkhorn_iterations >= 1, "sinkhorn_iterations", "it must be at least 1.")
        real = self.real_vocab is None or 1 <= self.real_vocab <= self.vocab_size
        need(self, real, "real_vocab", f"use None, or 1 to {self.vocab_size} (vocab_size).")
        if self.moe is not None:
            need(self, self.hidden % 8 == 0, "hidden", "use a multiple of 8 with experts (grouped products).")
            if self.moe.dense_layers >= self.layers:
                raise ValueError(
                    f"MoEConfig.dense_layers is {self.moe.dense_layers}: with {self.layers} layers no expert is left; "
                    f"lower it, or set moe to None."
                )
        for name, engram in self.engrams.items():
            self._check_engram(name, engram)

    def _check_engram(self, name: str, engram: EngramConfig) -> None:
        if not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise ValueError(f"An engram cannot be named {name!r}: choose another Python identifier, such as 'memory'.")
        for size in ("hidden", "branches"):
            if getattr(engram, size) != getattr(self, size):
                raise ValueError(
                    f"Engram {name!r} has {size} {getattr(engram, size)} in a decoder with {size} "
                    f"{getattr(self, size)}: make them equal."
                )
        if engram.layers[-1] >= self.layers:
            raise ValueError(
                f"Engram {name!r} asks for layer {engram.layers[-1]} of a decoder with layers 0 to {self.layers - 1}: "
                f"choose a layer that exists."
            )

    # -- derived -----------------------------------------------------------------------------------------------

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        assert self.head_dim is not None
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        assert self.head_dim is not None and self.kv_heads is not None
        return self.kv_heads * self.head_dim

    def moe_at(self, layer: int) -> MoEConfig | None:
        """The experts of a layer; None where its feed-forward is dense."""
        return self.moe if self.moe is not None and layer >= self.moe.dense_layers else None

    def engrams_at(self, layer: int) -> dict[str, EngramConfig]:
        """The memories that enter at a layer, by name."""
        return {name: engram for name, engram in self.engrams.items() if layer in engram.layers}

    # -- JSON --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; :meth:`from_dict` reads them back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["moe"] = None if self.moe is None else dataclasses.asdict(self.moe)
        fields["engrams"] = {name: engram.to_dict() for name, engram in self.engrams.items()}
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DecoderConfig:
        """A configuration from a mapping. Raises ``ValueError`` naming an unknown or missing field."""
        known = checked_fields(cls, fields)
        if known.get("moe") is not None:
            known["moe"] = MoEConfig(**checked_fields(MoEConfig, known["moe"]))
        known["engrams"] = {name: EngramConfig.from_dict(engram) for name, engram in known.get("engrams", {}).items()}
        return cls(**known)

    def to_json(self) -> str:
        """One JSON object with every field."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> DecoderConfig:
        """Inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))
