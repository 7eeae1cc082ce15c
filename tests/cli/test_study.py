"""``engram study`` refuses what it cannot do before anything is run."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("transformers")


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
