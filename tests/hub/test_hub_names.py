"""A model with memories is pushed to a hub and fetched from one, or from the cache alone, by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import huggingface_hub
from stand_in import stand_in_hub

from models import VOCAB, make_model, make_tokenizer
from torch_engram.hub import Attached, attach, config_for, from_pretrained, memories_of

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(4))
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # the client tells of itself


def give(model: Any, name: str, layer: int) -> Attached:
    tokenizer = make_tokenizer()
    config = config_for(model, tokenizer, layers=(layer,), heads=2, row_dim=8, rows_per_head=100, init_std=0.5)
    return attach(model, tokenizer, config, name=name)


def test_memories_are_pushed_with_the_model_and_fetched_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    give(model, "one", 1)
    with stand_in_hub(monkeypatch, str(tmp_path / "cache")) as repositories:
        model.push_to_hub("team/model")
        make_tokenizer().push_to_hub("team/model")
        found = from_pretrained("team/model", attn_implementation="eager").eval()
        assert list(memories_of(found)) == ["one"] and torch.equal(found(IDS).logits, model(IDS).logits)

        other = give(model, "other", 2)
        memories_of(model)["one"].detach()
        monkeypatch.chdir(tmp_path)
        Path("folder").mkdir()
        Path("folder/notes.txt").write_text("mine")
        model.save_pretrained("folder", push_to_hub=True, repo_id="team/model", commit_message="anew")
        first, *_, last = repositories["team/model"][1:]
        rows = [[name for name in files if "/rows-" in name] for files in (first, last)]
        assert rows[0] and rows[1] and not set(rows[0]) & set(rows[1]), "what is no memory any more is gone"
        assert {name.split("/")[1] for name in rows[1]} == {"other"} and "tokenizer.json" in last
        assert "notes.txt" not in last and len(repositories["team/model"]) == 4, "one commit a push"
        again = from_pretrained("team/model", attn_implementation="eager").eval()
        assert list(memories_of(again)) == ["other"] and torch.equal(again(IDS).logits, model(IDS).logits)
        other.detach()
        assert not vars(model).keys() & {"save_pretrained", "_upload_modified_files"}


def test_a_model_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache's own layout: files are links to what is named by content."""
    model = make_model("llama")
    give(model, "one", 1)
    model.save_pretrained(tmp_path / "saved")
    make_tokenizer().save_pretrained(tmp_path / "saved")
    commit, repository = "0123456789abcdef" * 2 + "01234567", tmp_path / "cache" / "models--team--model"
    for number, file in enumerate(file for file in (tmp_path / "saved").rglob("*") if file.is_file()):
        blob = repository / "blobs" / f"{number:040x}"
        link = repository / "snapshots" / commit / file.relative_to(tmp_path / "saved")
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    expected = model(IDS).logits
    for options in ({}, {"revision": commit}, {"local_files_only": True}, {"cache_dir": tmp_path / "cache"}):
        found = from_pretrained("team/model", attn_implementation="eager", **options).eval()
        assert torch.equal(found(IDS).logits, expected)
    for name in ("team/another", "no/such/folder"):
        with pytest.raises(ValueError, match=f"There is no folder '{name}', nor a model of that name .*: give") as said:
            from_pretrained(name)
        assert "\n" not in str(said.value)
    make_model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain holds no memories: load it with AutoModelForCausalLM"):
        from_pretrained(tmp_path / "plain")
