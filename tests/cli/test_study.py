"""``engram study``: what it cannot do is refused before anything is run, and a log is enough for its report."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

PAGE = Path(__file__).parents[2] / "docs" / "studies.md"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own to work in, where caches go too."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scale", "huge"], "--scale is 'huge': give small or full."),
        (["--device", "tpu"], "There is no device 'tpu': use 'cpu' or 'cuda'."),
    ],
)
def test_what_it_does_not_know(engram, tmp_path, words, said):
    done = engram("study", "facts", *words, "--out", tmp_path / "out")
    assert done.code == 1 and said in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(engram, tmp_path):
    done = engram("study", "facts", "--device", "cuda", "--out", tmp_path / "out")
    assert done.code == 1 and "sees no GPU here" in done.err


def test_a_folder_that_is_a_file(engram, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = engram("study", "facts", "--out", tmp_path / "file")
    assert done.code == 1 and "choose another folder with --out" in done.err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_package_that_is_missing_is_named(engram, tmp_path, monkeypatch):
    module = importlib.import_module("torch_engram.cli.study")
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "peft" else True)
    done = engram("study", "facts", "--out", tmp_path / "out")
    assert done.code == 1 and "needs the package peft: pip install 'torch-engram[studies]'" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe", "--scale", "huge"], "There is no scale 'huge': choose one of 'small', 'tiny'."),
        (["my.py"], "There is no file my.py: give a study's file, or one of recipe, allocation, slots."),
        (["empty.py"], "empty.py has no STUDY: let it hold a torch_engram.studies.study.Study of that name."),
    ],
)
def test_a_study_that_is_none(engram, here, words, said):
    (here / "empty.py").write_text("STUDIES = 1\n")
    done = engram("study", *words, "--device", "cpu", "--out", "out")
    assert done.code == 1 and done.err == f"engram: {said}"
    assert not (here / "out").exists()


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_a_report_of_a_folder_without_a_log(engram, here, folder):
    (here / "empty").mkdir()
    done = engram("study", "report", folder)
    assert done.code == 1 and done.err.startswith(f"engram: {folder} has no results of a study: give the --out")
    assert [path.name for path in here.iterdir()] == ["empty"]


def test_a_log_gives_the_report_again(engram, here, corpus_file):
    done = engram("study", "recipe", "--scale", "tiny", "--device", "cpu", "--data", corpus_file, "--out", "out")
    assert done.code == 0, done
    made = {path: path.read_bytes() for path in (here / "out").iterdir() if path.name != "runs.jsonl"}
    assert {path.suffix for path in made} == {".md", ".csv", ".html", ".svg", ".png"}
    for path in made:
        path.unlink()
    assert engram("study", "report", "out").code == 0
    assert {path: path.read_bytes() for path in made} == made


def test_the_page_s_study_of_ones_own(engram, here, corpus_file):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (here / "convolution.py").write_text(code)
    words = "study", "convolution.py", "--scale", "tiny", "--device", "cpu", "--data", corpus_file, "--out", "out"
    done = engram(*words, "--seeds", "1")
    assert done.code == 0 and "2 runs." in done.out, done
    log = (here / "out" / "runs.jsonl").read_text()
    results = [line for line in map(json.loads, log.splitlines()) if "result" in line]
    assert [line["study"] for line in results] == ["convolution.py"] * 2
    table = (here / "out" / "convolution.md").read_text()
    assert "| base | 1 |" in table and "| conv kernel 0 | 1 |" in table
    (here / "out" / "convolution.md").unlink()
    assert engram("study", "report", "out").code == 0 and (here / "out" / "convolution.md").read_text() == table
    assert engram(*words, "--seeds", "1").code == 0 and (here / "out" / "runs.jsonl").read_text() == log
