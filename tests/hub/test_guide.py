"""The page on attaching a memory runs as it is printed, on a small model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from models import make_model

PAGE = Path(__file__).parents[2] / "docs" / "give-a-model-a-memory.md"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # transformers tells what could be faster
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(PAGE.read_text(encoding="utf-8"))
    bpe = ByteLevelBPETokenizer()
    bpe.train(str(text), vocab_size=400, special_tokens=["<end>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(
        "tiny"
    )
    make_model("llama", vocab_size=400, num_hidden_layers=5).save_pretrained("tiny")
    names: dict[str, Any] = {"__name__": "page"}
    for code in PYTHON.findall(PAGE.read_text(encoding="utf-8")):
        exec(compile(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny"), PAGE.name, "exec"), names)
    assert "Ada Lovelace was born in" in capsys.readouterr().out
    assert (tmp_path / "people" / "attached.json").exists()
    assert list(names["memories_of"](names["plain"])) == ["people"]
