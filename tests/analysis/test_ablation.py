"""A memory switched off, and n-grams one by one: against models without it, rows set to zero, and small differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_engram.analysis.ablation import ablate
from torch_engram.analysis.locating import Carrier, Located, locate
from torch_engram.analysis.reading import read_text
from torch_engram.analysis.subject import DecoderSubject, open_subject
from torch_engram.stores import make_keys
from torch_engram.train import Loaded, Trainer, evaluate

Undo = list[tuple[Any, Tensor, Tensor]]
PROMPT, ANSWER = "By the way, the 7 horses of", " Wales were"


@pytest.fixture
def subject(trainer: Trainer) -> DecoderSubject:
    """A decoder with rows of some size, for what few steps teach is small."""
    model = trainer.recipe.model
    engrams = {name: replace(engram, init_std=0.5) for name, engram in model.engrams.items()}
    fresh = Trainer(replace(trainer.recipe, name="located", model=replace(model, engrams=engrams)), text=trainer.text)
    return DecoderSubject(fresh.decoder, fresh.banks, fresh.text.tokenizer)


def without_values(
    subject: DecoderSubject, layer: int, columns: slice | None = None, rows: Tensor | None = None
) -> Undo:
    """Sets rows of a layer to zero in its tables, all or those of some columns; the value undoes it."""
    (bank,) = subject.banks.values()
    undo: Undo = []
    for table in bank.tables:
        if table.layer != layer or (columns is not None and table.columns != columns):
            continue
        source = bank.source(table)
        own = torch.arange(table.rows) if rows is None else rows - table.first_row
        keys = make_keys(table.space, own)
        before = source.store.fetch(keys).clone()
        planes = source.format.decode(keys, before)
        undo.append((source.store, keys, before))
        planes |= {"value": torch.zeros_like(planes["value"]), "count": torch.ones_like(planes["count"])}
        source.store.write(keys, source.format.encode(keys, planes))  # type: ignore[attr-defined]
    return undo


def test_a_text_s_losses_with_the_memory_and_without(trainer: Trainer, loaded: Loaded) -> None:
    subject, file = open_subject(trainer.folder), trainer.validation_file()
    assert file is not None
    batches = list(trainer.data.in_order())[:3]
    found = ablate(subject, batches)
    wanted = evaluate(loaded.decoder, loaded.banks, trainer.text.files.train, batch_size=2, seq_len=32, batches=3)
    assert found.whole == pytest.approx(wanted.nats, rel=1e-5) and found.tokens == wanted.tokens
    assert set(found.without_one) == {("engram", 0), ("engram", 1)}
    assert len({found.whole, found.without, *found.without_one.values()}) == 4


def test_one_block_s_memory_off_is_one_without_rows_there(subject: DecoderSubject, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(PROMPT + ANSWER)
    batches = [each.batch for each in read_text(text, subject.tokenizer, 100)]
    found = ablate(subject, batches)
    without_values(subject, layer=1)
    again = ablate(subject, batches)
    assert again.whole == pytest.approx(found.without_one["engram", 1], rel=1e-6)
    assert again.whole != pytest.approx(found.whole, rel=1e-4)
    assert again.without_one["engram", 0] == pytest.approx(found.without, rel=1e-6)


def test_what_is_lost_is_what_rows_of_zero_lose(subject: DecoderSubject) -> None:
    """Of n-grams whose rows nothing else in the text reads: their rows are then set to zero in the table itself."""
    found = locate(subject, PROMPT, ANSWER)
    ids = torch.tensor([subject.tokenizer.encode(PROMPT + ANSWER, add_special_tokens=False).ids[:-1]])
    (bank,) = subject.banks.values()
    checked = 0
    for one in found.carriers[:12]:
        columns = slice(0, 2) if one.order == 2 else slice(2, 3)  # two heads of order 2, one of order 3
        rows = bank.addressing.lookup(ids)(one.layer)[1][0, :, columns]
        mine = rows[one.position]
        if (rows == mine).sum() == len(mine):
            undo = without_values(subject, one.layer, columns, mine)
            lost = found.log_probability - locate(subject, PROMPT, ANSWER).log_probability
            assert undo and lost == pytest.approx(one.lost, abs=1e-4)
            for store, keys, before in undo:
                store.write(keys, before)
            checked += 1
    assert checked >= 6


def test_what_is_attributed_is_the_slope_of_what_was_looked_up(subject: DecoderSubject) -> None:
    found = locate(subject, PROMPT, ANSWER)
    assert max(abs(one.attributed) for one in found.carriers) > 1e-3
    together = sum(one.attributed for one in found.carriers)  # along all that was looked up
    step, losses = 1e-3, []
    for factor in (1 - step, 1 + step):
        hooks = [engram.register_forward_pre_hook(lambda _, args, factor=factor: (args[0], args[1] * factor))
                 for engram in subject.engrams.values()]  # fmt: skip
        losses.append(locate(subject, PROMPT, ANSWER).log_probability)
        for hook in hooks:
            hook.remove()
    assert (losses[1] - losses[0]) / (2 * step) == pytest.approx(together, rel=0.05, abs=2e-3)


def test_every_n_gram_is_there_once_with_its_text(subject: DecoderSubject) -> None:
    found = locate(subject, PROMPT, ANSWER)
    tokens = len(subject.tokenizer.encode(PROMPT + ANSWER, add_special_tokens=False).ids) - 1
    places = {(one.layer, one.order, one.position) for one in found.carriers}
    assert len(places) == len(found.carriers) == 2 * 2 * tokens
    assert all(one.text in PROMPT + ANSWER and one.text for one in found.carriers)
    lost = [one.lost for one in found.carriers]
    assert lost == sorted(lost, reverse=True)
    with subject.disabled():
        assert locate(subject, PROMPT, ANSWER).log_probability == pytest.approx(found.without, abs=1e-5)


def carrier(lost: float) -> Carrier:
    return Carrier("engram", 0, 2, 1, "a b", lost, 0.0)


def test_half_of_what_is_lost() -> None:
    assert Located(-1, -3, tuple(map(carrier, (3.0, 2.0, 1.0, -4.0)))).half() == 1
    assert Located(-1, -3, tuple(map(carrier, (2.0, 2.0, 2.0, 1.0)))).half() == 2
    assert Located(-1, -3, (carrier(-1.0),)).half() == 0


def test_a_model_of_transformers_too(hub_folder: Path, tmp_path: Path) -> None:
    subject = open_subject(hub_folder)
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{3 + number * 7 % 60}" for number in range(120)))
    found = ablate(subject, [each.batch for each in read_text(text, subject.tokenizer, 100)])
    assert set(found.without_one) == {("memory", 0), ("memory", 1)} and found.without != found.whole
    located = locate(subject, "w3 w4 w5", " w6")
    assert located.without != located.log_probability and len(located.carriers) == 2 * 2 * 3
    assert {one.text for one in located.carriers} == {"w3", "w3 w4", "w4 w5", "w3 w4 w5"}


def test_what_cannot_be_answered_is_said(dense: Trainer, subject: DecoderSubject) -> None:
    without = open_subject(dense.folder)
    with pytest.raises(ValueError, match="no memory to switch off"):
        ablate(without, [dense.data.batch(0)])
    with pytest.raises(ValueError, match="no memory that a fact could be in"):
        locate(without, PROMPT, ANSWER)
    for prompt, answer in (("", "Wales"), ("Wales", "")):
        with pytest.raises(ValueError, match="need a token each"):
            locate(subject, prompt, answer)
