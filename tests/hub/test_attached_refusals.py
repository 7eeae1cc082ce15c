"""What does not fit is refused in one sentence, and the model is as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from torch import nn

from models import VOCAB, make_model, make_tokenizer
from torch_engram.hub import attach, config_for, load_memory, memories_of, save_memory

FIELDS: dict[str, Any] = dict(layers=(1,), heads=2, row_dim=8, rows_per_head=50)
IDS = torch.arange(3, 11)[None]


@pytest.fixture
def model():
    return make_model("llama")


@pytest.fixture
def untouched(model):
    """Checks at the end that nothing of a memory is left on the model."""
    before, names = model(IDS).logits, [name for name, _ in model.named_modules()]
    yield
    assert torch.equal(model(IDS).logits, before)
    assert [name for name, _ in model.named_modules()] == names
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())
    assert "save_pretrained" not in vars(model)


def refused(match: str, *arguments: Any, **named: Any) -> None:
    with pytest.raises(ValueError, match=match):
        attach(*arguments, **named)


def test_models_and_layers(model, untouched) -> None:
    tokenizer = make_tokenizer()
    config = config_for(model, tokenizer, **FIELDS)
    refused("Linear has no one list of decoder blocks .lists: none.: pass its path as blocks=", nn.Linear(2, 2),
            tokenizer, config)  # fmt: skip
    two = nn.ModuleDict({"left": make_model("llama"), "right": make_model("llama")})
    two.config = model.config
    refused(r"lists: 'left\.model\.layers', 'right\.model\.layers'\)", two, tokenizer, config)
    refused("LlamaForCausalLM has no module list 'layers': its lists are 'model.layers'", model, tokenizer, config,
            blocks="layers")  # fmt: skip
    refused("LlamaForCausalLM has 3 blocks, 0 to 2, and no block 7", model, tokenizer,
            config_for(model, tokenizer, **FIELDS | {"layers": (1, 7)}))  # fmt: skip
    wider = make_model("llama", hidden_size=64)
    refused("EngramConfig.hidden is 64, and the model has 32: use config_for", model, tokenizer,
            config_for(wider, tokenizer, **FIELDS))  # fmt: skip
    refused("'my memory' is no name for a memory", model, tokenizer, config, name="my memory")
    refused("'items' is no name for a memory", model, tokenizer, config, name="items")
    refused("There is no placement 'gpu'", model, tokenizer, config, placement="gpu")


def test_an_embedding_that_is_quantised() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    config, embedding = config_for(model, tokenizer, **FIELDS), model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight.to(torch.int8), requires_grad=False)
    refused("LlamaForCausalLM is quantised to torch.int8, .* leave the embedding out", model, tokenizer, config)
    assert not memories_of(model)


def test_tokenizers(model, untouched) -> None:
    config = config_for(model, make_tokenizer(), **FIELDS)
    refused("A object has no fast tokenizer behind it", model, object(), config)
    refused(f"EngramConfig.vocab_size is {config.vocab_size}, and the tokenizer has", model, make_tokenizer(40), config)


def test_a_name_that_is_taken(model) -> None:
    tokenizer = make_tokenizer()
    memory = attach(model, tokenizer, config_for(model, tokenizer, **FIELDS))
    refused("has a memory 'memory' already: detach it first, or give this one another name", model, tokenizer,
            memory.bank.config)  # fmt: skip
    assert list(memories_of(model)) == ["memory"]


def test_a_vocabulary_that_was_resized(model) -> None:
    tokenizer = make_tokenizer()
    attach(model, tokenizer, config_for(model, tokenizer, **FIELDS))
    model.resize_token_embeddings(VOCAB + 8)
    with pytest.raises(ValueError, match=f"resized from {VOCAB} to {VOCAB + 8} ids after memory 'memory' was attached"):
        model(IDS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, tokenizer = make_model("llama"), make_tokenizer()
    memory = attach(model, tokenizer, config_for(model, tokenizer, **FIELDS))
    model.train()
    optimizer = memory.optimizer()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    save_memory(memory, tmp_path / "memory")
    return tmp_path / "memory"


def load_refused(match: str, model: Any, folder: Path, tokenizer: Any = None) -> None:
    with pytest.raises(ValueError, match=match):
        load_memory(model, tokenizer or make_tokenizer(), folder)


def test_folders(model, untouched, saved, tmp_path) -> None:
    load_refused("holds no memory of a model: there is no attached.json in it", model, tmp_path)
    load_refused("was trained with another tokenizer", model, saved, make_tokenizer(40))
    load_refused("EngramConfig.hidden is 32, and the model has 64", make_model("llama", hidden_size=64), saved)
    load_refused("has 1 blocks, 0 to 0, and no block 1", make_model("llama", num_hidden_layers=1), saved)
    facts = json.loads((saved / "attached.json").read_text())
    modules = saved / facts["modules"]
    whole = load_file(modules)
    wrong: dict[str, dict[str, torch.Tensor]] = {
        "1.wkv.weight": {name: weight for name, weight in whole.items() if name != "1.wkv.weight"},
        "1.extra": whole | {"1.extra": torch.zeros(1)},
        "1.key_weight": whole | {"1.key_weight": torch.zeros(3, 32)},
    }
    for name, weights in wrong.items():
        save_file(weights, modules)
        load_refused(f"does not fit its configuration: see its tensor '{name}'", model, saved)
    torch.save(whole, modules)  # a pickle
    load_refused("is damaged", model, saved)
    modules.unlink()
    load_refused("is damaged", model, saved)
    (saved / "attached.json").write_text(json.dumps(facts | {"rows": "../elsewhere"}))
    load_refused("attached.json is damaged or of a newer version", model, saved)


def test_a_save_over_another_leaves_one_memory(saved) -> None:
    model = make_model("llama")
    memory = load_memory(model, make_tokenizer(), saved)
    expected = model(IDS).logits
    for _ in range(2):
        save_memory(memory, saved)
    assert len(list(saved.iterdir())) == 3
    other = make_model("llama")
    load_memory(other, make_tokenizer(), saved, name="other", optimizer=None)
    assert list(memories_of(other)) == ["other"] and torch.equal(other(IDS).logits, expected)
