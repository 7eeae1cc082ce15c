"""What stops a run: numbers that are no longer finite, sizes that do not fit, a device or package that is not there."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from torch_engram.train import Trainer
from torch_engram.train.checkpoint import checkpoints
from torch_engram.train.metrics import Metrics, read_metrics


def poison(trainer: Trainer, at: int) -> None:
    """A weight becomes NaN when step ``at`` is over."""

    def watch(progress):
        if progress.step == at:
            with torch.no_grad():
                trainer.decoder.norm.weight[0] = float("nan")

    trainer.run(watch)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_good_checkpoint(make_trainer):
    trainer = make_trainer(save_every=2, eval_every=100)
    with pytest.raises(ValueError, match=r"The loss is nan at step 4: lower the learning rates") as stopped:
        poison(trainer, 3)
    assert f"the last good checkpoint is {trainer.folder / 'step-00000002'}." in str(stopped.value)
    resumed = make_trainer(resume_run=True)
    assert resumed.step == 2
    resumed.run()


def test_weights_that_are_not_finite_are_not_saved(make_trainer):
    trainer = make_trainer(save_every=2, eval_every=100)
    with pytest.raises(
        ValueError, match="The weights are not finite after step 4: lower the learning rates"
    ) as stopped:
        poison(trainer, 4)
    assert str(stopped.value).endswith(f"the last good checkpoint is {trainer.folder / 'step-00000002'}.")
    assert [path.name for path in checkpoints(trainer.folder)] == ["step-00000002"]


def test_a_validation_that_is_not_finite_stops_the_run(make_trainer):
    trainer = make_trainer(save_every=2, eval_every=3)
    with pytest.raises(ValueError, match="The validation loss is nan after step 3: lower the learning rates"):
        poison(trainer, 3)
    assert "NaN" not in (trainer.folder / "metrics.jsonl").read_text()


def test_a_checkpoint_of_the_bad_rows_is_not_called_good(make_trainer):
    """Saved after the step that broke them and before the step that shows it."""
    trainer = make_trainer(save_every=2, eval_every=100, table={"prefetch": 0})

    def watch(progress):
        if progress.step == 4:
            bank = trainer.banks["engram"]
            bank.source(bank.tables[0]).store.table.records.fill_(255)  # as fp32, NaN

    with pytest.raises(ValueError, match="The loss is nan at step 5") as stopped:
        trainer.run(watch)
    good, bad = (trainer.folder / f"step-{step:08d}" for step in (2, 4))
    assert str(stopped.value).endswith(f"the last good checkpoint is {good}; remove {bad}, which gives the same.")


def test_absurd_rates_stop_the_run(make_trainer):
    rates = dict.fromkeys(("matrices", "embedding", "head", "router", "other"), 1e38)
    trainer = make_trainer(rates=rates, table={"lr": 1e38}, warmup=0)
    with pytest.raises(ValueError, match=r"at step \d: lower the learning rates; there is no good checkpoint\."):
        trainer.run()
    for line in (trainer.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_gradients_that_are_not_finite_stop_before_anything_is_saved(make_trainer):
    """With a finite loss, clipping by an infinite norm would leave NaN in every weight."""
    trainer = make_trainer(save_every=1, steps=3)
    trainer.decoder.embedding.weight.register_hook(lambda grad: torch.full_like(grad, float("inf")))
    with pytest.raises(ValueError, match=r"The norm of the gradients is .* at step 1") as stopped:
        trainer.run()
    assert "there is no good checkpoint" in str(stopped.value)
    assert not list(trainer.folder.glob("step-*"))


def test_a_compiler_that_is_not_there(make_recipe, text, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"compile=true needs a C\+\+ compiler, such as g\+\+: install one"):
        Trainer(make_recipe(compile=True), text=text)


def test_a_gpu_that_is_not_there(make_recipe, text, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', but PyTorch sees no GPU here: use device cpu"):
        Trainer(make_recipe(device="cuda"), text=text)


@pytest.mark.parametrize("tracker", ["trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed(make_trainer, monkeypatch, tracker):
    module = {"trackio": "trackio", "tensorboard": "torch.utils.tensorboard"}[tracker]
    monkeypatch.setitem(sys.modules, module, None)
    trainer = make_trainer(tracker=tracker)
    with pytest.raises(ValueError, match=f"needs the package '{tracker}': pip install {tracker}, or tracker=none"):
        trainer.run()


def test_every_line_of_metrics_is_json_with_its_step(make_recipe, tmp_path):
    metrics = Metrics(tmp_path / "run", make_recipe())
    metrics.log(1, loss=2.5)
    metrics.log(2, loss=2.0, grad_norm=1.0)
    metrics.close()
    lines = metrics.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2.0, "grad_norm": 1.0},
    ]


def test_a_full_disk_for_metrics_is_one_sentence(make_recipe, tmp_path, largest_file):
    metrics = Metrics(tmp_path / "run", make_recipe())
    metrics.log(1, loss=2.5)
    with largest_file(metrics.path.stat().st_size + 5):
        with pytest.raises(ValueError, match=r"Cannot write .*metrics\.jsonl \(.*\): make room"):
            metrics.log(2, loss=2.5)
        metrics.close()
    assert read_metrics(tmp_path / "run") == [{"step": 1, "loss": 2.5}]


def test_a_run_writes_what_the_recipe_asks_for(make_trainer, lines_of):
    trainer = make_trainer(log_every=2, eval_every=3, save_every=3, steps=7, keep=9)
    trainer.run()
    lines = lines_of(trainer)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 7]
    assert [line["step"] for line in lines if "validation" in line] == [3, 6, 7]
    assert {"loss", "lr_factor", "grad_norm", "tokens", "expert_peak_load"} <= set(lines[0])
    assert sorted(path.name for path in trainer.folder.glob("step-*")) == [f"step-{n:08d}" for n in (3, 6, 7)]


def test_a_full_disk_for_rows_stops_the_run_and_the_checkpoint_before_it_is_whole(make_trainer, largest_file):
    base = make_trainer().recipe.model
    engrams = {"engram": replace(base.engrams["engram"], rows_per_head=3000)}
    settings = dict(model=replace(base, engrams=engrams), save_every=2, eval_every=100, table={"placement": "disk"})
    trainer = make_trainer(**settings)
    rows = trainer.folder / "rows-engram" / "rows-00.safetensors"
    with ExitStack() as held:

        def watch(progress):
            if progress.step == 3:
                held.enter_context(largest_file(rows.stat().st_size // 2))

        # A step meets it, which writes past what its thread has written; or the save, which waits for all.
        with pytest.raises(
            (OSError, ValueError), match="make room on its disk, and go on from a checkpoint"
        ) as stopped:
            trainer.run(watch)
    assert isinstance(stopped.value, OSError) or "step-00000002 is whole" in str(stopped.value)
    del trainer, watch, stopped
    resumed, whole = make_trainer(resume_run=True, **settings), make_trainer(name="whole", **settings)
    assert resumed.step == 2
    assert resumed.run().score == whole.run().score
