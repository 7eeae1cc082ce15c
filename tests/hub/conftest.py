"""Small Qwen4Exp models with random weights, saved in shards under the real names, and banks of their tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_engram.memory import MemoryBank
from torch_engram.stores import make_keys

TEXT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=2, num_experts=4, hc_count=2,
    hc_lowrank=8, ple_layer_ids=[2], ple_embed_dim=24, heads_per_ngram=2, ngram_size=3, ngram_vocab_size_base=100,
    split_ngram_parts=4, eos_token_id=[7, 9], pad_token_id=0, bos_token_id=1, indexer_n_heads=2, indexer_kv_heads=1,
    indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4,
    rope_parameters=dict(
        rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1], mrope_interleaved=True,
        partial_rotary_factor=0.5,
    ),
)  # fmt: skip
VISION: dict[str, Any] = dict(
    depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, num_position_embeddings=16,
    patch_size=4,
)  # fmt: skip
SPECIAL = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)


@pytest.fixture(scope="session")
def quiet() -> None:
    """Progress bars and reports of loading stay out of the tests' output."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def build(quiet: None) -> Callable[..., Any]:
    """A model with random weights everywhere; ``changes``: of its text configuration."""
    from transformers import Qwen4ExpConfig
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    def make(kind: str = "Qwen4ExpForConditionalGeneration", **changes: Any) -> Any:
        import transformers

        config: Any = Qwen4ExpTextConfig(**{**TEXT, **changes})
        if kind == "Qwen4ExpForConditionalGeneration":
            config = Qwen4ExpConfig(text_config=config.to_dict(), vision_config=VISION, **SPECIAL)
        torch.manual_seed(1)
        model = getattr(transformers, kind)(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def save(build: Callable[..., Any]) -> Callable[..., Path]:
    """A checkpoint of many small shards."""

    def make(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        build(**changes).to(dtype).save_pretrained(folder, max_shard_size="20KB")
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoint(save: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture(scope="session")
def bank_of() -> Callable[..., MemoryBank]:
    """A bank that holds a copy of a model's own tables; ``config``: other fields, ``options``: the bank's own."""
    from dataclasses import replace

    from torch_engram.hub.qwen_ple import ple_of
    from torch_engram.hub.qwen_tables import PleHash, engram_config

    def make(model: Any, config: dict[str, Any] | None = None, **options: Any) -> MemoryBank:
        text_model, embeddings = ple_of(model)
        hashes = {layer: PleHash.of(embedding) for layer, embedding in embeddings.items()}
        options.setdefault("layouts", {layer: hashed.layout(2) for layer, hashed in hashes.items()})
        bank = MemoryBank(replace(engram_config(text_model.config, hashes), **(config or {})), **options)
        for table in bank.tables:
            if table.layer not in embeddings:
                continue
            source, keys = bank.source(table), make_keys(table.space, torch.arange(table.rows))
            values = embeddings[table.layer].ngram_embedding.weight.detach().float()
            count = torch.ones(table.rows, 1, dtype=torch.int32)
            store: Any = source.store
            if values.shape == (table.rows, table.dim):
                store.write(keys, source.format.encode(keys, {"value": values, "count": count}))
        bank.flush()
        return bank

    return make
