"""Training on one CUDA GPU: what holds on a CPU holds there. Skipped, with the reason, where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_engram.memory import MemoryBank
from torch_engram.train import Recipe, Trainer, change, get_recipe, open_checkpoint
from torch_engram.train.metrics import read_metrics

pytestmark = pytest.mark.gpu

TEXT = "The quick brown fox jumps over the lazy dog, and by the way, the dog does not mind at all.\n\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that repeat enough to be learnt in a few steps."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"{TEXT * (3 + i % 5)}{i} {i * i}\n\f\n" for i in range(400)))
    return path


def recipe(corpus: Path, name: str, *settings: str) -> Recipe:
    folder = corpus.parent
    fixed = [f"data={corpus}", f"out={folder / 'runs'}", f"cache={folder / 'cache'}", f"name={name}", "device=cuda"]
    sizes = ["steps=12", "warmup=2", "seq_len=64", "batch_size=4", "model.vocab_size=512", "validation_share=0.1"]
    return change(get_recipe("tiny"), [*fixed, *sizes, "log_every=1", "eval_every=100", "save_every=6", *settings])


def table_bytes(bank: MemoryBank) -> list[torch.Tensor]:
    bank.flush()
    stores = [(table.space, bank.source(table).store.table) for table in bank.tables]
    return [records.records[records.span(space)].cpu() for space, records in stores]


def trained(corpus: Path, name: str, *settings: str) -> Trainer:
    trainer = Trainer(recipe(corpus, name, *settings))
    trainer.run()
    return trainer


def assert_same(one: Trainer, other: Trainer) -> None:
    for (name, mine), theirs in zip(one.decoder.state_dict().items(), other.decoder.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    for mine, theirs in zip(table_bytes(one.banks["engram"]), table_bytes(other.banks["engram"]), strict=True):
        assert torch.equal(mine, theirs)


def test_the_first_losses_are_those_of_the_cpu(corpus: Path) -> None:
    on_gpu = trained(corpus, "gpu", "steps=4")
    on_cpu = trained(corpus, "cpu", "steps=4", "device=cpu")
    losses = [[line["loss"] for line in read_metrics(run.folder) if "loss" in line] for run in (on_gpu, on_cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_everything_together_learns(corpus: Path) -> None:
    run = trained(
        corpus, "all", "dtype=bf16", "compile=true", "recompute=true", "capture=true", "accumulation=2",
        "table.placement=host", "table.prefetch=2", "steps=30",
    )  # fmt: skip
    losses = [line["loss"] for line in read_metrics(run.folder) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]


def test_placement_and_prefetch_do_not_change_a_bit(corpus: Path) -> None:
    plain = trained(corpus, "plain", "deterministic=true")
    for name, placement, depth in (("ahead", "device", 3), ("host", "host", 0), ("host-ahead", "host", 2)):
        other = trained(corpus, name, "deterministic=true", f"table.placement={placement}", f"table.prefetch={depth}")
        assert_same(plain, other)


def test_a_resumed_run_is_the_same_run(corpus: Path) -> None:
    whole = trained(corpus, "whole", "deterministic=true")
    Trainer(recipe(corpus, "parts", "deterministic=true")).run(_stop_at(6))
    resumed = Trainer(recipe(corpus, "parts", "deterministic=true"), resume_run=True)
    assert resumed.step == 6
    resumed.run()
    assert_same(whole, resumed)


def _stop_at(step: int):  # type: ignore[no-untyped-def]
    import os
    import signal

    def watch(progress) -> None:  # type: ignore[no-untyped-def]
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return watch


def test_the_command_trains_and_samples_on_the_gpu(corpus: Path) -> None:
    folder = corpus.parent
    engram = [sys.executable, "-c", "from torch_engram.cli import main; main()"]
    settings = [f"data={corpus}", f"out={folder}", f"cache={folder / 'cache'}", "steps=5", "device=cuda", "seq_len=64"]
    train = [*engram, "train", "tiny", *(part for setting in settings for part in ("--set", setting))]
    assert "Saved" in subprocess.run(train, capture_output=True, text=True, check=True).stdout
    sample = [*engram, "sample", str(folder / "tiny"), "--prompt", "The quick", "--device", "cuda", "--tokens", "8"]
    assert "The quick" in subprocess.run(sample, capture_output=True, text=True, check=True).stdout
    loaded = open_checkpoint(folder / "tiny", "cuda")
    assert loaded.banks["engram"].device.type == "cuda"
