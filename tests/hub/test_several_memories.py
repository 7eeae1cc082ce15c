"""Several memories on one model: each by its name, apart in training, switching, saving and detaching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from models import VOCAB, make_model, make_tokenizer
from torch_engram.hub import Attached, attach, config_for, from_pretrained, load_memory, memories_of, save_memory
from torch_engram.stores import make_keys

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(4))


def give(model: Any, name: str, layers: tuple[int, ...], **fields: Any) -> Attached:
    tokenizer = make_tokenizer()
    config = config_for(model, tokenizer, layers=layers, heads=2, row_dim=8, rows_per_head=100, init_std=0.5, **fields)
    torch.manual_seed(len(name))
    return attach(model, tokenizer, config, name=name, seed=len(name))


def values(memory: Attached) -> torch.Tensor:
    memory.bank.flush()
    (table,) = memory.bank.tables
    return memory.bank.source(table).store.fetch(make_keys(table.space, torch.arange(table.rows)))


def test_they_add_up_and_are_switched() -> None:
    model = make_model("llama")
    plain = model(IDS).logits
    one = give(model, "one", (1,))
    with_one = model(IDS).logits
    other = give(model, "other", (1,), max_ngram=2)
    both = model(IDS).logits
    assert not torch.allclose(both, with_one) and not torch.allclose(with_one, plain)
    with other.disabled():
        assert torch.equal(model(IDS).logits, with_one)
        with one.disabled():
            assert torch.equal(model(IDS).logits, plain)
    assert torch.equal(model(IDS).logits, both)
    one.detach()
    assert list(memories_of(model)) == ["other"] and not any(w.requires_grad for w in model.model.parameters())
    other.detach()
    assert torch.equal(model(IDS).logits, plain) and all(w.requires_grad for w in model.parameters())


def test_each_is_trained_by_its_own_optimiser() -> None:
    model = make_model("llama")
    one, other = give(model, "one", (0,)), give(model, "other", (2,))
    optimizer = one.optimizer()
    before = values(one), values(other)
    model.train()
    with other.disabled():
        model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(values(one), before[0]) and torch.equal(values(other), before[1])


def test_they_decode_with_one_cache(tmp_path: Path) -> None:
    model = make_model("llama")
    give(model, "second", (0, 1))
    give(model, "first", (1,))  # of a block, the one that came later sees the other
    full = model(IDS).logits
    with torch.no_grad():
        first = model(IDS[:, :5], use_cache=True)
        rest = model(IDS[:, 5:], cache=first.cache)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), full, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, make_tokenizer(), attn_implementation="eager").eval()
    assert list(memories_of(again)) == ["second", "first"]
    torch.testing.assert_close(again(IDS).logits, full)


def test_one_is_saved_alone_and_goes_onto_another_copy(tmp_path: Path) -> None:
    model = make_model("llama")
    one = give(model, "one", (1,))
    expected = model(IDS).logits
    give(model, "other", (2,))
    save_memory(one, tmp_path / "shared")
    copy = make_model("llama")
    load_memory(copy, make_tokenizer(), tmp_path / "shared", optimizer=None, name="theirs")
    assert torch.equal(copy(IDS).logits, expected)
