"""The page on production tables runs as it is printed: its commands, its Python, and its lines for Qwen4Exp."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers.models.qwen4_exp", reason="needs transformers with Qwen4Exp")

from torch_engram.cli import app
from torch_engram.hub import serve_ple

PAGE = Path(__file__).parents[2] / "docs" / "serve-a-production-table.md"
TINIER = (
    "cache=cache", "model.vocab_size=300", "model.hidden=32", "model.ffn_hidden=16", "validation_share=0.2",
    "model.engrams.engram.rows_per_head=50", "seq_len=16", "batch_size=2", "steps=2", "warmup=1",
)  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page_runs_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sentences = [f"The king finds stone {number}, and a bird follows the ship." for number in range(300)]
    Path("my_text.txt").write_text("\n\f\n".join(sentences))
    for line in blocks("sh")[0].replace("\\\n", " ").splitlines():
        arguments = line.split()[1:]
        if arguments[0] == "train":
            arguments += [part for change in TINIER for part in ("--set", change)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (line, done)
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    assert names["streams"].isfinite().all()
    for file in Path("v41").iterdir():
        assert file.read_bytes() == (Path("copy") / file.name).read_bytes(), file.name
    listed = set(re.findall(r"`([\w.]+\.(?:json|safetensors)|SHA256SUMS)`", PAGE.read_text()))
    assert {file.name for file in Path("v41").iterdir()} - {"tables.safetensors"} <= listed
    assert {"engram_layer_ids", "engram_vocab_size"} < json.loads(Path("v41/config.json").read_text())[
        "text_config"
    ].keys()


@torch.no_grad()
def test_the_lines_for_qwen4exp(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen4-Exp").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(blocks("py")[0], names)
    tokens = torch.randint(10, 60, (2, 9))
    serve_ple(names["model"], names["bank"])
    assert torch.equal(names["ours"](tokens).logits, names["model"](tokens).logits)
