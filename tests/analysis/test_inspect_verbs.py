"""``engram trace`` and ``engram gates`` as a user runs them, and what all such verbs say of a model without memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from torch_engram.analysis import gate_map
from torch_engram.cli.analyze_tables import collisions, usage
from torch_engram.cli.gates import gates
from torch_engram.cli.trace import trace
from torch_engram.train import Loaded, Trainer

APP = typer.Typer()
APP.command()(trace)
APP.command()(gates)
APP.command()(usage)
APP.command()(collisions)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def traced(*arguments: str) -> list[dict[str, Any]]:
    tokens: list[dict[str, Any]] = json.loads(run("trace", *arguments, "--json"))["tokens"]
    return tokens


def test_published_vectors() -> None:
    tokens = traced("--preset", "deepseek-v4.1", "--canonical-ids", "10,20,30,40")
    assert [token["canonical_id"] for token in tokens] == [10, 20, 30, 40]
    assert all(token["raw_id"] is None and token["text"] is None and token["gates"] is None for token in tokens)
    rows = tokens[-1]["rows"]
    assert list(rows) == ["1", "14"] and len(rows["1"]) == 24
    assert rows["1"][:4] == [1326936, 22120929, 40011923, 55142539] and rows["1"][-1] == 378628807


def test_a_preset_of_raw_ids() -> None:
    (token,) = traced("--preset", "qwen-ple", "--canonical-ids", "7")
    assert token["raw_id"] == 7 and token["canonical_id"] is None and len(token["rows"]["1"]) == 16


def test_a_preset_with_a_tokenizer(tokenizer_files: dict[str, Path]) -> None:
    text = "Only Alexander the Great could tame the horse Bucephalus."
    tokenizer = str(tokenizer_files["deepseek-v4"])
    tokens = traced("--preset", "deepseek-v4.1", "--tokenizer", tokenizer, "--text", text, "--layer", "1")
    assert "".join(token["text"] for token in tokens) == text
    ids = ",".join(str(token["canonical_id"]) for token in tokens)
    again = traced("--preset", "deepseek-v4.1", "--canonical-ids", ids, "--layer", "1")
    assert [token["rows"] for token in tokens] == [token["rows"] for token in again]


def test_a_checkpoint(checkpoint: Path, loaded: Loaded) -> None:
    text = "白日 <b>"
    tokens = traced("--checkpoint", str(checkpoint), "--text", text)
    expected = gate_map(loaded.decoder, loaded.banks, loaded.tokenizer, text)
    assert tuple(token["raw_id"] for token in tokens) == expected.ids
    assert tuple(token["text"] for token in tokens) == expected.tokens
    for layer in (0, 1):
        found = torch.tensor([token["gates"][str(layer)] for token in tokens])
        assert torch.equal(found, expected.gates["engram", layer])
    ids = ",".join(str(token["canonical_id"]) for token in tokens)
    again = traced("--checkpoint", str(checkpoint), "--canonical-ids", ids, "--layer", "1")
    assert [token["rows"] for token in again] == [{"1": token["rows"]["1"]} for token in tokens]
    assert again[0]["gates"] is None


def test_a_trace_for_people(checkpoint: Path) -> None:
    (token,) = traced("--checkpoint", str(checkpoint), "--text", "B", "--layer", "1")
    shown = run("trace", "--checkpoint", str(checkpoint), "--text", "B", "--layer", "1")
    assert f'"B"  raw {token["raw_id"]}  canonical {token["canonical_id"]}' in shown
    assert "order 2, heads 0-1" in shown and "order 3, heads 0-0" in shown
    assert all(str(row) in shown for row in token["rows"]["1"])
    assert all(f"{gate:.3f}" in shown for gate in token["gates"]["1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a"], "either --preset or --checkpoint"),
        (["--preset", "demo"], "either --text or --canonical-ids"),
        (["--preset", "demo", "--text", "a"], "--tokenizer"),
        (["--preset", "dmo", "--canonical-ids", "1"], "did you mean 'demo'"),
        (["--preset", "demo", "--canonical-ids", "1;2"], "10,20,30,40"),
        (["--preset", "demo", "--canonical-ids", "1", "--layer", "2"], "choose one of 1, 15"),
        (["--checkpoint", "nowhere", "--text", "a"], "nowhere"),
        (["--checkpoint", "nowhere", "--text", "a", "--tokenizer", "b"], "leave out --tokenizer"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run("trace", *arguments)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_memory(dense: Trainer) -> None:
    with pytest.raises(ValueError, match="no memory"):
        run("trace", "--checkpoint", str(dense.folder), "--text", "a")
    with pytest.raises(ValueError, match="no memory"):
        run("gates", str(dense.folder), "--text", "a")
    with pytest.raises(ValueError, match="no memory"):
        run("usage", str(dense.folder))
    with pytest.raises(ValueError, match="no memory"):
        run("collisions", "--checkpoint", str(dense.folder), "--text", "demo")


def test_gates_in_the_terminal_and_as_a_page(checkpoint: Path, loaded: Loaded, tmp_path: Path) -> None:
    text = "the way <script> 床"
    page = tmp_path / "gates.html"
    shown = run("gates", str(checkpoint), "--text", text, "--html", str(page))
    expected = gate_map(loaded.decoder, loaded.banks, loaded.tokenizer, text)
    for layer in (0, 1):
        assert f"engram, layer {layer}" in shown
        for token, gate in zip(expected.tokens, expected.gates["engram", layer].mean(dim=1).tolist(), strict=True):
            assert f"{token or '▪'}[{gate:.2f}]" in shown
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html and "床" in html and "&lt;" in html


def test_the_verbs_do_not_import_torch() -> None:
    code = "import sys, torch_engram.cli.trace, torch_engram.cli.gates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
