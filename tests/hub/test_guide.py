"""The pages on attaching a memory and on sharing one run as they are printed, on a small model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from stand_in import stand_in_hub
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from models import make_model
from torch_engram.cli import app
from torch_engram.hub import load_memory

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers tells what could be faster


def blocks(page: str, language: str) -> list[str]:
    """The page's code in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a page's Python in an empty folder, with a model of its own words; returns the page's names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # a second and more, each time

    def run(name: str) -> dict[str, Any]:
        page = (DOCS / name).read_text(encoding="utf-8")
        Path("text.txt").write_text(page)
        bpe = ByteLevelBPETokenizer()
        bpe.train("text.txt", vocab_size=400, special_tokens=["<end>"], show_progress=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>")
        tokenizer.save_pretrained("tiny")
        make_model("llama", vocab_size=400, num_hidden_layers=5).save_pretrained("tiny")
        Path("tasks").mkdir()
        for file, language in (("born.jsonl", "json"), ("born.yaml", "yaml")):
            (Path("tasks") / file).write_text("".join(blocks(page, language)))
        names: dict[str, Any] = {"__name__": "page"}
        for code in blocks(page, "python"):
            exec(compile(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny"), name, "exec"), names)
        return names

    return run


def test_a_model_gets_a_memory(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("give-a-model-a-memory.md")
    assert "Ada Lovelace was born in" in capsys.readouterr().out
    assert (tmp_path / "people" / "attached.json").exists()
    assert list(names["memories_of"](names["plain"])) == ["people"]
    page = (DOCS / "give-a-model-a-memory.md").read_text(encoding="utf-8")
    (command,) = (code for code in blocks(page, "sh") if code.startswith("engram eval"))
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0 and "born" in done.output and (tmp_path / "born.json").exists()


def test_a_memory_is_shared(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_hub(monkeypatch, str(tmp_path / "cache")) as repositories:
        names = run("share-a-memory.md")
    assert list(repositories) == ["team/model-with-memories", "team/people"]
    parent = make_model("llama", vocab_size=400, num_hidden_layers=5)
    load_memory(parent, names["tokenizer"], "parent")
    for text in ("Grace Hopper was born in 1906.", "Emmy Noether was a mathematician from Erlangen."):
        ids = names["tokenizer"](text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            before, *after = (model(ids, labels=ids).loss for model in (parent, names["model"], names["reader"]))
        assert after[0] == after[1] < before
