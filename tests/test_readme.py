"""The README's code runs, and the two languages say it with the same code, commands and tables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from torch_engram.cli import app

ROOT = Path(__file__).parents[1]
README, CHINESE, GUIDE = ROOT / "README.md", ROOT / "README.zh.md", ROOT / "docs" / "guide.md"

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and content of every fenced block, in order."""
    return FENCE.findall(path.read_text(encoding="utf-8"))


def tables(path: Path) -> list[str]:
    """The lines of all tables outside fenced blocks, in order."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return [line for line in text.splitlines() if line.startswith("|")]


def commands(path: Path) -> list[str]:
    """Every ``engram …`` or ``pip …`` that stands in inline code, in order."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return re.findall(r"`((?:engram|pip|python) [^`]*)`", text)


@pytest.mark.parametrize("page", [README, GUIDE], ids=lambda page: page.name)
def test_the_python_of_the_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks after each other, as a reader would type them, in a folder that holds only the page's tables."""
    code = [content for language, content in blocks(page) if language == "python"]
    assert code, f"{page} shows no Python"
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"^engram (table synth .*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert CliRunner().invoke(app, line.split()).exit_code == 0, line
    program = tmp_path / "readme.py"
    code.append("assert loss.isfinite() and step.done and any(param.grad is not None for param in engram.parameters())")
    if page is GUIDE:
        code[-1] = "assert loss.isfinite() and step.done and schedule.last_epoch == len(batches)"
    program.write_text("\n".join(code), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "error", program.name],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_both_languages_hold_the_same_code_commands_and_tables() -> None:
    assert blocks(CHINESE) == blocks(README)
    assert commands(CHINESE) == commands(README)
    assert tables(CHINESE) == tables(README)
