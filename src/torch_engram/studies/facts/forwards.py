"""A model's forward in parts: hidden states, and the map to logits, which is wanted at few positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def hidden_states(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of the last block, normalised ``[B, T, d]``; a model with adapters is one too."""
    decoder = _base(model).get_decoder()
    hidden: Tensor = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden


def output_of(model: Any) -> nn.Linear:
    """The map from hidden states to logits."""
    found: nn.Linear = _base(model).get_output_embeddings()
    return found


def mixed(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model
