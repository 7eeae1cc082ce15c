"""``engram table export``: from a training run to a production format's folder, and back, with the command alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers.models.qwen4_exp", reason="needs transformers with Qwen4Exp")

from torch_engram.cli import app
from torch_engram.data import load_tokenizer, tokenizer_digest
from torch_engram.hub import read_deepseek, read_ple
from torch_engram.stores import CODECS
from torch_engram.train import open_checkpoint

Command = Callable[..., Any]
V41 = ("fusion=deepseek-v4.1", "conv_kernel=0", "row_dim=32")
PLE = ("fusion=qwen-ple", "scheme=qwen_ple", "row_multiple=128")


def run_of(corpus: Path, tiny: tuple[str, ...], out: Path, fields: tuple[str, ...]) -> Path:
    """The folder of a run of two steps."""
    changes = [*(f"model.engrams.engram.{field}" for field in fields), "model.hidden=32", "model.branches=2", "steps=2"]
    settings = [part for change in (*changes, f"data={corpus}", f"out={out}") for part in ("--set", change)]
    done = CliRunner().invoke(app, ["train", "tiny", *tiny, *settings])
    assert done.exit_code == 0, done
    return out / "tiny"


@pytest.fixture(scope="module")
def v41_run(corpus_file: Path, tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose memory is DeepSeek-V4.1's in all but size; not to be changed."""
    return run_of(corpus_file, tiny, tmp_path_factory.mktemp("v41"), V41)


@torch.no_grad()
def test_a_run_is_exported_and_read(engram: Command, v41_run: Path, tmp_path: Path) -> None:
    done = engram("table", "export", v41_run, tmp_path / "out", "--format", "deepseek-v4.1")
    assert done.code == 0 and done.out.startswith("Wrote") and done.out.endswith("in 2 files."), done
    loaded = open_checkpoint(v41_run)
    written = load_tokenizer(tmp_path / "out")
    assert tokenizer_digest(written) == tokenizer_digest(loaded.tokenizer)
    bank, engrams = read_deepseek(tmp_path / "out")  # with the vocabulary of the tokenizer that lies beside
    own = loaded.decoder.blocks[1].engrams["engram"]
    assert list(engrams) == [1] and bank.addressing.layouts == loaded.banks["engram"].addressing.layouts
    torch.testing.assert_close(engrams[1].wkv.weight, own.wkv.weight, rtol=2**-4, atol=2e-3)
    tokens = torch.randint(100, (2, 9))
    exact = loaded.banks["engram"].read(tokens).wait(1)["engram"]
    fp8 = CODECS["fp8"].decode(CODECS["fp8"].encode(exact.view(-1, 32))).view(exact.shape)
    assert exact.any() and torch.equal(bank.read(tokens).wait(1)["engram"], fp8)
    assert engram("table", "verify", tmp_path / "out").out.count("whole") == 2
    assert "DeepSeek-V4.1" in engram("table", "info", tmp_path / "out").out
    again = engram(
        "table", "export", v41_run, tmp_path / "again", "--format", "deepseek-v4.1", "--like", tmp_path / "out"
    )
    assert again.code == 0
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_a_run_of_qwens_scheme(engram: Command, corpus_file: Path, tiny: tuple[str, ...], tmp_path: Path) -> None:
    run = run_of(corpus_file, tiny, tmp_path, (*PLE, "row_dim=8"))
    done = engram("table", "export", run, tmp_path / "out", "--format", "qwen-ple", "--shards", "4")
    assert done.code == 0 and done.out.endswith("in 5 files."), done
    loaded, (bank, engrams) = open_checkpoint(run), read_ple(tmp_path / "out")
    own = loaded.decoder.blocks[1].engrams["engram"].state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in engrams[1].state_dict().items())
    tokens = torch.randint(100, (2, 9))
    rows = [one.read(tokens).wait(1)["engram"] for one in (bank, loaded.banks["engram"])]
    assert rows[0].any() and torch.equal(*rows)


def test_a_saved_memory_is_its_tables(engram: Command, v41_run: Path, tmp_path: Path) -> None:
    memory = next(v41_run.glob("step-*/memory-engram"))
    done = engram("table", "export", memory, tmp_path / "out", "--format", "deepseek-v4.1")
    assert done.code == 0 and done.out.endswith("in 1 file."), done
    with pytest.raises(ValueError, match=r"There is no tensor 'layers\.1\.engram\.wkv\.weight'"):
        read_deepseek(tmp_path / "out", vocab=open_checkpoint(v41_run).banks["engram"].addressing.vocab)


def test_mistakes_are_one_sentence(engram: Command, v41_run: Path, tmp_path: Path) -> None:
    out, memory = tmp_path / "out", next(v41_run.glob("step-*/memory-engram"))
    damaged = shutil.copytree(v41_run, tmp_path / "damaged")
    part = next(damaged.glob("step-*/memory-engram/table-00/*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    for arguments, message in (
        ((v41_run, out, "--format", "qwen"), "There is no format 'qwen': did you mean 'qwen-ple'?"),
        ((v41_run, out, "--format", "qwen-ple"), "has scheme 'engram', and Qwen4Exp has 'qwen_ple' always"),
        ((v41_run, out, "--format", "deepseek-v4.1", "--shards", 2), "has one tensor a table: leave out --shards"),
        ((v41_run, out, "--format", "qwen-ple", "--like", out), "--like is for deepseek-v4.1: leave it out"),
        (
            (v41_run, out, "--format", "deepseek-v4.1", "--memory", "x"),
            "has the memories 'engram': say which by --memory",
        ),
        ((memory, out, "--format", "deepseek-v4.1", "--memory", "x"), "is one memory: leave out --memory"),
        ((tmp_path, out, "--format", "deepseek-v4.1"), "There is no checkpoint in"),
        ((v41_run, tmp_path, "--format", "deepseek-v4.1"), "is there already: give another folder"),
        ((damaged, out, "--format", "deepseek-v4.1"), f"{part.name} is no whole safetensors file"),
        ((v41_run, out, "--format", "deepseek-v4.1", "--like", tmp_path), "config.json cannot be read"),
    ):
        done = engram("table", "export", *arguments)
        assert done.code == 1 and message in done.err and done.err.count("engram: ") == 1, done
        assert not out.exists() and not (tmp_path / "out.converting").exists()
