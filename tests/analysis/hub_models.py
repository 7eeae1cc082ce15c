"""Tiny models of transformers with random weights, over a tokenizer of words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<end>", "<pad>", "<unknown>", *(f"w{number}" for number in range(3, 64))]


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def hub_model(kind: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    common = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, max_position_embeddings=128, pad_token_id=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **(common | changes))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
