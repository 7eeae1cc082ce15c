"""Tiny causal models with random weights, of every architecture that a memory is attached to here, and a tokenizer."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB, LAYERS = 64, 3
PAD = 1
_COMMON = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=48, max_position_embeddings=128, pad_token_id=PAD, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4,
    n_group=1, topk_group=1, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=16,
    first_k_dense_replace=1, num_key_value_heads=2,
)  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "gpt2": {},
    "gpt_neox": {},
    "phi": {"num_key_value_heads": 2},
    "olmo2": {},
    "deepseek_v3": _LATENT,
    "deepseek_v4": dict(
        moe_intermediate_size=16,
        head_dim=16,
        q_lora_rank=16,
        num_experts_per_tok=2,
        n_routed_experts=4,
        hc_mult=3,
        layer_types=["sliding_attention"] * LAYERS,
        mlp_layer_types=["moe"] * LAYERS,
        o_groups=2,
        o_lora_rank=8,
        partial_rotary_factor=0.5,
        sliding_window=64,
    ),
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16},
}


def make_model(kind: str, **changes: Any) -> PreTrainedModel:
    """In eval mode; the same weights each time."""
    config = AutoConfig.for_model(kind, **(_COMMON | ARCHITECTURES[kind] | changes))
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return model


def make_tokenizer(words: int = VOCAB) -> PreTrainedTokenizerFast:
    """One word an id."""
    transformers.logging.set_verbosity_error()
    names = ["<end>", "<pad>", "<unknown>", *(f"w{number}" for number in range(3, words))]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
