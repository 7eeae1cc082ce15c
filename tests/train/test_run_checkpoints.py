"""Checkpoints are whole or absent, and hold nothing but safetensors and JSON."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import torch_engram
from torch_engram.data import train_bpe
from torch_engram.generate import generate
from torch_engram.train import open_checkpoint
from torch_engram.train.checkpoint import checkpoints


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_save_load_save_is_identity(make_trainer):
    first = make_trainer(steps=2).run().checkpoint
    again = make_trainer(steps=2, resume_run=True)
    saved = listing(first)
    shutil.rmtree(first)
    assert listing(again.save()) == saved


def test_the_newest_are_kept_and_nothing_hidden_is_left(make_trainer):
    trainer = make_trainer(save_every=1, keep=2)
    trainer.run()
    assert sorted(os.listdir(trainer.folder)) == ["metrics.jsonl", "step-00000005", "step-00000006"]


def test_a_later_checkpoint_shares_the_rows_that_did_not_change(make_trainer, make_recipe):
    model = make_recipe().model
    engram = replace(model.engrams["engram"], rows_per_head=20_011)
    trainer = make_trainer(model=replace(model, engrams={"engram": engram}), save_every=3)
    trainer.run()
    parts = [sorted(path.glob("memory-engram/table-00/*")) for path in checkpoints(trainer.folder)]
    whole = [part for part in parts[1] if part.name.startswith("rows")]
    assert [part.stat().st_ino for part in whole] == [part.stat().st_ino for part in parts[0]]
    assert sum(part.stat().st_size for part in parts[1]) < 1.2 * sum(part.stat().st_size for part in parts[0])


def test_an_opened_checkpoint_is_the_trained_model(make_trainer, text):
    trainer = make_trainer(table={"placement": "host"})
    outcome = trainer.run()
    prompt = [text.tokenizer.encode("the king", add_special_tokens=False).ids]
    trainer.decoder.eval()
    expected = generate(trainer.decoder, trainer.banks, prompt, max_new_tokens=8)
    for path in (trainer.folder, outcome.checkpoint):
        loaded = open_checkpoint(path)
        assert generate(loaded.decoder, loaded.banks, prompt, max_new_tokens=8) == expected
        assert not loaded.decoder.training
        assert loaded.facts["step"] == 6 and loaded.facts["recipe"] == json.loads(json.dumps(trainer.recipe.to_dict()))


def test_a_full_disk_leaves_the_previous_checkpoint_whole(make_trainer, run_steps, state_of, assert_same, largest_file):
    """Whichever file is the one that does not fit."""
    run_steps(make_trainer(), 2)
    trainer = make_trainer(resume_run=True)
    before = state_of(trainer)
    earlier = checkpoints(trainer.folder)[0]
    saved = listing(earlier)
    trainer.train_step()
    trainer.step = 3
    sizes = sorted({len(data) for data in saved.values()}, reverse=True)
    for size in sizes:
        with largest_file(size - 1), pytest.raises(ValueError, match="make room") as failed:
            trainer.save()
        assert f"Cannot save {trainer.folder / 'step-00000003'} " in str(failed.value)
        assert f"{earlier} is whole" in str(failed.value)
        assert listing(earlier) == saved
        assert sorted(os.listdir(trainer.folder)) == ["metrics.jsonl", earlier.name]  # and its bytes are free again
    assert_same(state_of(make_trainer(resume_run=True)), before)
    assert trainer.save().name == "step-00000003"  # with room again, the run goes on


def test_what_a_killed_save_or_removal_left_is_invisible_and_goes(make_trainer, run_steps):
    run_steps(make_trainer(), 2)
    folder = make_trainer(resume_run=True).folder
    whole = folder / "step-00000002"
    for step in (1, 3):
        left = folder / f".step-{step:08d}.partial"
        shutil.copytree(whole, left)
        (left / "model.safetensors").write_bytes(b"half")
    assert checkpoints(folder) == [whole]
    trainer = make_trainer(resume_run=True)
    assert trainer.step == 2
    trainer.run()
    assert sorted(os.listdir(folder)) == ["metrics.jsonl", "step-00000002", "step-00000006"]


def test_a_checkpoint_appears_and_disappears_at_once(make_trainer, monkeypatch):
    """At every moment of a save or removal that the file system can see, each visible checkpoint opens."""
    trainer = make_trainer(keep=1)
    trainer.save()
    seen = set()

    def watched(change):
        def call(*arguments, **options):
            visible = sorted(trainer.folder.glob("step-*"))
            seen.add(tuple(path.name for path in visible))
            assert visible and visible == checkpoints(trainer.folder)
            for path in visible:
                open_checkpoint(path)
            return change(*arguments, **options)

        return call

    trainer.train_step()
    trainer.step = 1
    for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    trainer.save()
    monkeypatch.undo()
    assert seen == {("step-00000000",), ("step-00000000", "step-00000001"), ("step-00000001",)}


FILES = [
    "model.safetensors",
    "optimizer.safetensors",
    "tokenizer.json",
    "memory-engram/memory.json",
    "memory-engram/canonical-*.safetensors",
    "memory-engram/table-00/rows-*.safetensors",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
def test_a_damaged_file_is_named(make_trainer, name, damage):
    checkpoint = make_trainer(steps=1).run().checkpoint
    [path] = checkpoint.glob(name)
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        path.unlink()
    else:
        middle = data.rindex(b"0") if path.suffix == ".json" else len(data) - 5
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    with pytest.raises(ValueError) as failed:
        open_checkpoint(checkpoint)
    named = str(failed.value)
    assert str(path) in named or str(path.parent) in named
    assert named.endswith((".", ")"))
    if name != "memory-engram/canonical-*.safetensors":  # a resumed run has the vocabulary of its own tokenizer
        with pytest.raises(ValueError):
            make_trainer(steps=1, resume_run=True)


def test_a_truncated_checkpoint_json_is_named_and_without_one_there_is_no_checkpoint(make_trainer):
    checkpoint = make_trainer(steps=1).run().checkpoint
    facts = checkpoint / "checkpoint.json"
    facts.write_bytes(facts.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-00000001/checkpoint\.json is damaged"):
        open_checkpoint(checkpoint.parent)
    facts.unlink()
    assert checkpoints(checkpoint.parent) == []
    with pytest.raises(ValueError, match="There is no checkpoint in"):
        open_checkpoint(checkpoint.parent)


@pytest.mark.parametrize("content", ["[]", "5", "null", '"text"', "{}", '{"step": 1, "sha256": []}', "{", b"\xff\xfe"])
def test_a_foreign_checkpoint_json_is_refused(make_trainer, content):
    checkpoint = make_trainer(steps=1).run().checkpoint
    (checkpoint / "checkpoint.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"checkpoint\.json is damaged, or none of torch-engram's"):
        open_checkpoint(checkpoint)


def test_somebody_elses_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "config.json"):
        with pytest.raises(ValueError, match=r"There is no checkpoint in .*give a run's folder"):
            open_checkpoint(path)


def test_another_tokenizer_is_refused(make_trainer, make_recipe, corpus_file):
    """Swapped inside the checkpoint, with checksums made to fit; and given to a resumed run."""
    from torch_engram.durable import file_digest
    from torch_engram.train import Trainer

    checkpoint = make_trainer(steps=1).run().checkpoint
    other = train_bpe(["the horse sees the king. " * 9] * 9, 280)
    path = checkpoint.parent / "other.json"
    other.save(str(path))
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        Trainer(make_recipe(tokenizer=str(path)), resume_run=True)
    shutil.copy(path, checkpoint / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json is truncated, damaged or missing"):
        open_checkpoint(checkpoint)
    facts = json.loads((checkpoint / "checkpoint.json").read_text())
    facts["sha256"]["tokenizer.json"] = file_digest(checkpoint / "tokenizer.json")
    (checkpoint / "checkpoint.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer of this checkpoint"):
        open_checkpoint(checkpoint)


def test_nothing_is_ever_pickled(make_trainer, run_steps, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("pickle")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dump")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "dumps", refuse)
    run_steps(make_trainer(), 2)
    outcome = make_trainer(resume_run=True).run()
    open_checkpoint(outcome.checkpoint)
    suffixes = {path.suffix for path in outcome.checkpoint.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_no_module_imports_pickle_or_calls_torch_load():
    sources = list(Path(torch_engram.__file__).parent.rglob("*.py"))
    assert len(sources) > 40
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                roots = {name.split(".")[0] for name in names}
                assert not roots & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, source
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), source
