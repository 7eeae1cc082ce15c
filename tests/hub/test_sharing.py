"""Memories that go from hand to hand: touched rows alone, rows trained alone, several of one parent merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers

from models import VOCAB, make_model, make_tokenizer
from torch_engram.hub import Attached, attach, config_for, load_memory, memories_of, merge_memories, save_memory
from torch_engram.optim import RowAdam
from torch_engram.stores import make_keys

FIELDS: dict[str, Any] = dict(layers=(0, 2), heads=2, row_dim=8, rows_per_head=20_000)
LOW = torch.arange(3, 30).view(3, 9)
HIGH = torch.arange(30, 57).view(3, 9)
"""Texts of other words, so of other n-grams."""


def rows_adam(rows: Any) -> RowAdam:
    return RowAdam(rows, lr=1e-1)


def train(memory: Attached, ids: Tensor, steps: int = 3) -> None:
    model = memory._model.train()
    optimizer = memory.optimizer(lr=1e-2)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def records(memory: Attached) -> list[Tensor]:
    memory.bank.flush()
    return [
        memory.bank.source(table).store.fetch(make_keys(table.space, torch.arange(table.rows)))
        for table in memory.bank.tables
    ]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A memory that has learned a little of everything, rows and modules."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    memory = attach(model, tokenizer, config_for(model, tokenizer, **FIELDS), optimizer=rows_adam)
    train(memory, torch.randint(3, VOCAB, (2, 9)))
    save_memory(memory, tmp_path / "base", touched_only=True)
    return tmp_path / "base"


def child(folder: Path, ids: Tensor | None = None, freeze: bool = True, **options: Any) -> Attached:
    """Of the memory in ``folder``, on a model of its own, its rows trained on ``ids``."""
    memory = load_memory(make_model("llama"), make_tokenizer(), folder, optimizer=rows_adam, **options)
    memory.engrams.requires_grad_(not freeze)
    if ids is not None:
        train(memory, ids)
    return memory


def logits(memory: Attached, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = memory._model(ids).logits
    return found


@pytest.mark.parametrize("options", [{}, {"codec": "bf16", "placement": "host"}])
def test_touched_rows_alone_make_the_same_model(tmp_path: Path, options: dict[str, str]) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    memory = attach(model, tokenizer, config_for(model, tokenizer, **FIELDS), optimizer=rows_adam, **options)
    untrained = [logits(memory, ids) for ids in (LOW, HIGH)]
    train(memory, LOW)
    save_memory(memory, tmp_path / "whole")
    for again in range(2):  # and over an earlier one
        save_memory(memory, tmp_path / "touched", touched_only=True)
        assert len(list((tmp_path / "touched").iterdir())) == 3, again
    whole, touched = (
        sum(file.stat().st_size for file in (tmp_path / name).rglob("*.safetensors")) for name in ("whole", "touched")
    )
    assert touched < whole / 50
    other = child(tmp_path / "touched", **{key: value for key, value in options.items() if key == "placement"})
    assert torch.equal(logits(other, LOW), logits(memory, LOW)) and not torch.equal(logits(other, LOW), untrained[0])
    assert torch.equal(logits(other, HIGH), untrained[1])  # whose rows nobody has touched
    for mine, theirs in zip(records(memory), records(other), strict=True):
        assert torch.equal(mine, theirs)


def test_rows_are_trained_alone(base: Path, tmp_path: Path) -> None:
    memory = child(base)
    model: Any = memory._model
    weights = {name: weight.clone() for name, weight in [*model.named_parameters(), *memory.engrams.named_parameters()]}
    before, start = records(memory), model(LOW, labels=LOW).loss.item()
    train(memory, LOW)
    assert model(LOW, labels=LOW).loss.item() < start
    assert not any(torch.equal(new, old) for new, old in zip(records(memory), before, strict=True))
    data = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in HIGH]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
    )
    before = records(memory)
    transformers.Trainer(model, arguments, train_dataset=data, optimizers=(memory.optimizer(), None)).train()
    assert not any(torch.equal(new, old) for new, old in zip(records(memory), before, strict=True))
    for name, weight in [*model.named_parameters(), *memory.engrams.named_parameters()]:
        assert torch.equal(weight, weights[name]), name


def test_two_that_learned_other_texts_are_one_that_knows_both(base: Path, tmp_path: Path) -> None:
    low, high = child(base, LOW), child(base, HIGH)
    save_memory(low, tmp_path / "low", touched_only=True)
    save_memory(high, tmp_path / "high")
    merged = child(base)
    before = records(merged)
    merge_memories(merged, tmp_path / "low", tmp_path / "high")
    for old, *both in zip(before, records(low), records(high), strict=True):
        one, other = ((new != old).any(1) for new in both)
        assert one.any() and other.any() and not (one & other).any(), "no row is both texts'"
    assert torch.equal(logits(merged, LOW), logits(low, LOW))
    assert torch.equal(logits(merged, HIGH), logits(high, HIGH))
    assert not torch.equal(logits(low, HIGH), logits(high, HIGH))
    save_memory(merged, tmp_path / "merged", touched_only=True)
    again = child(tmp_path / "merged")
    for memory in (merged, again):
        train(memory, LOW)
    assert torch.equal(logits(again, HIGH), logits(merged, HIGH))
    assert torch.equal(logits(again, LOW), logits(merged, LOW)) and not torch.equal(
        logits(low, LOW), logits(again, LOW)
    )


def test_modules_that_differ_are_refused_or_averaged(base: Path, tmp_path: Path) -> None:
    children = [child(base, ids, freeze=False) for ids in (LOW, HIGH)]
    for number, each in enumerate(children):
        save_memory(each, tmp_path / str(number), touched_only=True)
    folders = [tmp_path / "0", tmp_path / "1"]
    memory = child(base)
    before, own = records(memory), logits(memory, LOW)
    refusals: list[tuple[str, list[Path], dict[str, Any]]] = [
        ("merge_memories.. got no folder", [], {}),
        (r"0/modules-\w+.safetensors has other modules than memory 'memory' \(see its tensor '0.*train rows alone",
         folders, {}),
        ("There is no rule 'most'", folders, {"rule": "most"}),
        ("holds no memory of a model", [*folders, tmp_path], {}),
    ]  # fmt: skip
    for sentence, given, options in refusals:
        with pytest.raises(ValueError, match=sentence):
            merge_memories(memory, *given, **options)
    small = make_model("llama")
    config = config_for(small, make_tokenizer(), **FIELDS | {"rows_per_head": 100})
    save_memory(attach(small, make_tokenizer(), config), tmp_path / "small")
    with pytest.raises(ValueError, match=r"small.* holds a memory with another configuration than 'memory'"):
        merge_memories(memory, tmp_path / "small")
    assert torch.equal(logits(memory, LOW), own)
    assert all(torch.equal(new, old) for new, old in zip(records(memory), before, strict=True))
    merge_memories(memory, *folders, average_modules=True)
    for name, weight in memory.engrams.state_dict().items():
        expected = sum(each.engrams.state_dict()[name] for each in children) / 2
        torch.testing.assert_close(weight, expected)
    assert list(memories_of(memory._model)) == ["memory"] and not torch.equal(logits(memory, LOW), own)
