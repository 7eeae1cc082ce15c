"""The page on attaching a memory runs as it is printed, on a small model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from models import make_model
from torch_engram.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "give-a-model-a-memory.md"


def blocks(language: str) -> list[str]:
    """The page's code in this language."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # transformers tells what could be faster
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # a second and more, each time
    text = tmp_path / "text.txt"
    text.write_text(PAGE.read_text(encoding="utf-8"))
    bpe = ByteLevelBPETokenizer()
    bpe.train(str(text), vocab_size=400, special_tokens=["<end>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(
        "tiny"
    )
    make_model("llama", vocab_size=400, num_hidden_layers=5).save_pretrained("tiny")
    (tmp_path / "tasks").mkdir()
    for name, language in (("born.jsonl", "json"), ("born.yaml", "yaml")):
        (tmp_path / "tasks" / name).write_text(*blocks(language))
    names: dict[str, Any] = {"__name__": "page"}
    for code in blocks("python"):
        exec(compile(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny"), PAGE.name, "exec"), names)
    assert "Ada Lovelace was born in" in capsys.readouterr().out
    assert (tmp_path / "people" / "attached.json").exists()
    assert list(names["memories_of"](names["plain"])) == ["people"]
    (command,) = (code for code in blocks("sh") if code.startswith("engram eval"))
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0 and "born" in done.output and (tmp_path / "born.json").exists()
