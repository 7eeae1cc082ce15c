"""Real processes under real signals: ``kill -9`` at random moments, and Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torch_engram.train import Progress, Recipe, Trainer
from torch_engram.train.checkpoint import checkpoints
from torch_engram.train.metrics import read_metrics

ENGRAM = Path(sys.executable).with_name("engram")

# Forks children that train, so that torch is imported once; kills each at a random moment and looks at what is there.
KILLER = """
import json, os, random, signal, sys, time
import torch
import torch._dynamo
torch.set_num_threads(1)
from pathlib import Path
from torch_engram.train import Recipe, Trainer, open_checkpoint
from torch_engram.train.build import build_text
from torch_engram.train.checkpoint import checkpoints

recipe = Recipe.from_dict(json.loads(sys.argv[1]))
text = build_text(recipe)
folder = Path(recipe.out) / recipe.name
draw = random.Random(3)
steps, killed = [], 0
while killed < 10:
    hears, tells = os.pipe()
    child = os.fork()
    if not child:
        try:
            Trainer(recipe, resume_run=bool(checkpoints(folder)), text=text).run(lambda progress: os.write(tells, b"."))
        finally:
            os._exit(0)
    if draw.random() < 0.8:  # else it may still be at its start
        os.read(hears, 1)
    time.sleep(draw.uniform(0, 0.4))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    visible = sorted(folder.glob("step-*"))
    assert visible == checkpoints(folder), visible
    for path in visible:  # whole, each of them, and so the newest that a run would resume from
        open_checkpoint(path)
    if visible:
        steps.append(int(visible[-1].name.removeprefix("step-")))
    if not os.WIFSIGNALED(status):
        break
print(json.dumps({"killed": killed, "steps": steps}))
"""


def child_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}


@pytest.mark.parametrize("placement", ["device", "disk"])
def test_kill_9_at_random_moments(make_recipe, make_trainer, state_of, assert_same, lines_of, placement):
    """The newest complete checkpoint always opens and resumes, no half-written one is ever visible, and the run that
    was killed over and over ends where an undisturbed one does."""
    table = {"placement": placement, "prefetch": 1}
    settings = dict(steps=80, save_every=1, keep=2, eval_every=30, accumulation=1, table=table)
    recipe = make_recipe(**settings)
    found = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(recipe.to_dict())],
        capture_output=True, text=True, env=child_environment(), timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    seen = json.loads(found.stdout)
    assert seen["killed"] >= 3 and len(set(seen["steps"])) >= 3, seen
    assert seen["steps"] == sorted(seen["steps"])  # never a step back
    resumed = make_trainer(resume_run=True, **settings)
    assert resumed.step == seen["steps"][-1]
    resumed.run()
    kept, rows = ["metrics.jsonl", "step-00000079", "step-00000080"], resumed.folder / "rows-engram"
    assert sorted(os.listdir(resumed.folder)) == sorted([*kept, *([rows.name] if placement == "disk" else [])])
    assert not rows.exists() or os.listdir(rows) == ["rows-00.safetensors"]
    whole = make_trainer(name="whole", **{**settings, "save_every": 0})
    whole.run()
    assert_same(state_of(resumed), state_of(whole))
    assert lines_of(resumed) == lines_of(whole)


Start = Callable[[list[str]], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that heed Ctrl-C, even where this one ignores it, as under nohup; none outlives its test."""
    started = []

    def begin(command: list[str]) -> subprocess.Popen[str]:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # one that is ignored is inherited so
        try:
            started.append(
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment()
                )
            )
        finally:
            signal.signal(signal.SIGINT, before)
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def command(corpus_file: Path, tmp_path: Path) -> list[str]:
    settings = [
        f"data={corpus_file}", f"out={tmp_path / 'runs'}", f"cache={tmp_path / 'cache'}", "model.vocab_size=300",
        "model.hidden=16", "model.ffn_hidden=16", "model.engrams.engram.rows_per_head=50", "validation_share=0.2",
        "seq_len=16", "batch_size=2", "steps=100000", "schedule=linear", "floor=1", "log_every=1", "eval_every=100000",
        "save_every=0",
    ]  # fmt: skip
    return [str(ENGRAM), "train", "tiny", *(part for setting in settings for part in ("--set", setting))]


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if len(read_metrics(folder)) >= steps:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("the run does not get anywhere")


def test_ctrl_c_saves_says_where_and_resumes_bit_for_bit(start, command, tmp_path, state_of, assert_same):
    folder = tmp_path / "runs" / "tiny"
    process = start(command)
    wait_for_steps(folder, 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    [saved] = checkpoints(folder)
    step = int(saved.name.removeprefix("step-"))
    assert step >= 3
    resume = f"Go on with: {shlex.join(['engram', *command[1:]])} --resume"
    assert f"Stopped after step {step}; saved {saved}. {resume}\n" in out  # whole, however wide the terminal is

    recipe = Recipe.from_dict(json.loads((saved / "checkpoint.json").read_text())["recipe"])
    changed = {"steps": step + 2}
    resumed = Trainer(Recipe.from_dict({**recipe.to_dict(), **changed}), resume_run=True)
    assert resumed.step == step
    resumed.run()
    whole = Trainer(Recipe.from_dict({**recipe.to_dict(), **changed, "name": "whole"}), text=resumed.text)
    whole.run()
    assert_same(state_of(resumed), state_of(whole))


def test_a_second_ctrl_c_ends_at_once(start, command, tmp_path):
    """The first one is still at work here: with a step that never ends, it would never come to save."""
    folder = tmp_path / "runs" / "tiny"
    slow = "import time, torch_engram.train.loop as loop; step = loop.Trainer.train_step\n" + (
        "def endless(trainer):\n    if trainer.step >= 2: time.sleep(1000)\n    return step(trainer)\n"
        "loop.Trainer.train_step = endless\nfrom torch_engram.cli import main; main()"
    )
    process = start([sys.executable, "-c", slow, *command[1:]])
    wait_for_steps(folder, 2, process)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    assert checkpoints(folder) == []


def test_a_second_process_in_the_folder_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(steps=3, save_every=0)
    program = """
import json, sys
from torch_engram.train import Recipe, Trainer
try:
    Trainer(Recipe.from_dict(json.loads(sys.argv[1]))).run()
except ValueError as error:
    print(error)
"""
    said = []

    def watch(progress: Progress) -> None:
        if progress.step == 2:
            command = [sys.executable, "-c", program, json.dumps(recipe.to_dict())]
            said.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())

    trainer = Trainer(recipe)
    trainer.run(watch)
    folder = Path(recipe.out) / recipe.name
    assert said == [f"Another process trains in {folder}: wait for it, or set another name= or out=."]
    assert [line["step"] for line in read_metrics(folder)][-1] == 3


def test_a_run_that_another_made_out_of_date_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    one, other = Trainer(make_recipe(steps=3)), Trainer(make_recipe(steps=3, seed=7))  # both find the folder empty
    one.run()
    lines = (one.folder / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"Another process trained in .* meanwhile: set another name= or out="):
        other.run()
    assert (one.folder / "metrics.jsonl").read_text() == lines


def test_an_ignored_interrupt_stays_ignored(make_recipe: Callable[..., Recipe]) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome = Trainer(make_recipe(steps=3)).run(lambda progress: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.step == 3 and not outcome.interrupted
