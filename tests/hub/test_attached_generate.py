"""A model with a memory decodes as its full forward says: whatever a cache does to the sequences, and with padding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import pipeline

from models import PAD, VOCAB, make_model, make_tokenizer
from torch_engram.hub import attach, config_for

NEW = 8


@pytest.fixture(scope="module")
def model():
    """With rows and taps that are anything but zero, so that every token's memory and what came before it count."""
    made, tokenizer = make_model("llama"), make_tokenizer()
    config = config_for(made, tokenizer, layers=(0, 2), heads=2, row_dim=8, rows_per_head=500, init_std=1.0)
    memory = attach(made, tokenizer, config)
    with torch.no_grad():
        for engram in memory.engrams.values():
            engram.convolution.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    return made


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(5))


def greedy(model, prompt: Tensor, steps: int = NEW) -> Tensor:
    """By full forwards alone."""
    for _ in range(steps):
        prompt = torch.cat((prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return prompt


SETTINGS = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=PAD)


@torch.no_grad()
def test_greedy_with_a_cache(model, ids) -> None:
    expected = greedy(model, ids)
    assert not torch.equal(expected[:, 6:], expected[:, 6:7].expand(-1, NEW))  # it says something
    for cache in (None, "static", "dynamic"):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **SETTINGS)
        assert torch.equal(found, expected), cache
    assert torch.equal(model.generate(ids, use_cache=False, attention_mask=torch.ones_like(ids), **SETTINGS), expected)


@torch.no_grad()
def test_left_padding_changes_nothing(model, ids) -> None:
    short = ids[1, :4]
    batch = torch.stack((ids[0], torch.cat((torch.full((2,), PAD), short))))
    mask = (batch != PAD).long()
    for cache in ("dynamic", "static"):
        found = model.generate(batch, attention_mask=mask, cache_implementation=cache, **SETTINGS)
        assert torch.equal(found[0], greedy(model, ids[:1])[0])
        assert torch.equal(found[1, 2:], greedy(model, short[None])[0])


@torch.no_grad()
def test_beams_are_those_of_full_forwards(model, ids) -> None:
    """A beam that changes its sequence takes along what the memory remembers of it."""
    settings = SETTINGS | dict(num_beams=4, num_return_sequences=4, attention_mask=torch.ones_like(ids))
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


@torch.no_grad()
def test_samples_are_those_of_full_forwards(model, ids) -> None:
    settings = SETTINGS | dict(do_sample=True, num_return_sequences=3, attention_mask=torch.ones_like(ids))
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(ids, use_cache=use_cache, **settings))
    assert torch.equal(*found)


@torch.no_grad()
def test_rejected_drafts_are_taken_back(model, ids) -> None:
    prompt = ids[:1].repeat(1, 3)  # n-grams that come again, so that drafts are made
    settings = SETTINGS | dict(attention_mask=torch.ones_like(prompt))
    expected = greedy(model, prompt)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=4, **settings), expected)
    assert torch.equal(model.generate(prompt, assistant_model=make_model("llama"), **settings), expected)


@torch.no_grad()
def test_a_cache_that_is_copied_goes_on_by_itself(model, ids) -> None:
    """As for a prompt that many continue."""
    first = model(ids[:, :5], use_cache=True)
    other = copy.deepcopy(first.cache)
    one = model(ids[:, 5:], cache=first.cache).logits
    torch.testing.assert_close(model(ids[:, 5:], cache=other).logits, one)
    torch.testing.assert_close(one[:, -1], model(ids).logits[:, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_strange_cache_is_refused(model, ids) -> None:
    (memory,) = model.engram_memories.values()
    with memory.disabled():
        filled = model(ids, use_cache=True).cache
    with pytest.raises(
        ValueError, match="holds 6 positions, and memory 'memory' has seen 0 of them: begin with an empty"
    ):
        model(ids[:, :1], cache=filled)
    with pytest.raises(ValueError, match="this call has inputs_embeds alone: pass input_ids, or leave the memory out"):
        model(inputs_embeds=model.get_input_embeddings()(ids))


@torch.no_grad()
def test_a_pipeline(model, ids) -> None:
    tokenizer = make_tokenizer()
    text = tokenizer.decode(ids[0])
    told = pipeline("text-generation", model=model, tokenizer=tokenizer)(text, return_full_text=False, **SETTINGS)
    assert told[0]["generated_text"].split() == tokenizer.decode(greedy(model, ids[:1])[0, 6:]).split()


@torch.no_grad()
def test_packed_documents_are_as_alone(model, ids) -> None:
    packed = ids.view(1, -1)
    positions = torch.arange(6).repeat(2)[None]
    found = model(packed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found.view(2, 6, -1), model(ids).logits, rtol=1e-4, atol=1e-5)
