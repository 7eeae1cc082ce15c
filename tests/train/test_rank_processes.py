"""``engram train --nproc`` as a user runs it, and what becomes of it under real signals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from torch_engram.train import Recipe, Trainer
from torch_engram.train.checkpoint import checkpoints
from torch_engram.train.metrics import read_metrics

ENGRAM = Path(sys.executable).with_name("engram")
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(corpus_file: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts ``engram train`` on two ranks, whose Ctrl-C is heeded even under nohup; none outlives its test."""
    settings = [
        f"data={corpus_file}", f"out={tmp_path / 'runs'}", f"cache={tmp_path / 'cache'}", "model.vocab_size=300",
        "model.hidden=16", "model.ffn_hidden=16", "model.engrams.engram.rows_per_head=50", "validation_share=0.2",
        "seq_len=16", "batch_size=2", "schedule=linear", "floor=1", "log_every=1", "eval_every=100000",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
    started = []

    def begin(*more: str, resume: bool = False) -> subprocess.Popen[str]:
        sets = (part for setting in (*settings, *more) for part in ("--set", setting))
        command = [str(ENGRAM), "train", "tiny", *sets, "--nproc", "2", *(["--resume"] if resume else [])]
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            started.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
            )
        finally:
            signal.signal(signal.SIGINT, before)
        return started[-1]

    yield begin
    for process in started:
        process.terminate()  # its ranks, too
        process.communicate(timeout=60)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    for _ in range(2400):
        if any(line["step"] >= step for line in read_metrics(folder)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("the run does not get anywhere")


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks, in their order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return [pid for rank in range(len(environments)) for pid in environments if b"RANK=%d" % rank in environments[pid]]


def test_two_ranks_end_and_are_stopped_killed_and_resumed(start, tmp_path):
    """What a run says it says once; a mistake is one sentence; Ctrl-C saves and says how to go on; a killed rank stops
    all, and what was saved goes on, here in one process."""
    folder = tmp_path / "runs" / "tiny"
    process = start("steps=3", "save_every=2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == ""
    told = ("Parameters: ", "Validation: ", f"Saved {folder / 'step-00000003'}; ")
    assert [out.count(words) for words in told] == [1, 1, 1]
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 3] and lines[2]["tokens"] == 3 * 2 * 2 * 16

    process = start("steps=100000")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    mend = "pass --resume to go on with it, or set another name= or out=."
    assert err == f"engram: {folder} already holds a run: {mend}\n"

    process = start("steps=100000", "save_every=0", resume=True)
    wait_for_step(folder, 6, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    saved = checkpoints(folder)[-1]
    step = int(saved.name.removeprefix("step-"))
    assert step >= 6 and out.count("Stopped after step") == 1
    again = shlex.join(["engram", *process.args[1:]])
    assert f"Stopped after step {step}; saved {saved}. Go on with: {again}\n" in out

    process = start("steps=100000", "save_every=2", resume=True)
    wait_for_step(folder, step + 5, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == (
        "engram: Rank 1 was stopped (SIGKILL, which the system does where memory runs out); the newest checkpoint is "
        "whole: go on with --resume.\n"
    )
    newest = checkpoints(folder)[-1]
    facts = json.loads((newest / "checkpoint.json").read_text())
    assert facts["step"] >= step + 3  # the save of an even step may have been under way
    resumed = Trainer(
        replace(Recipe.from_dict(facts["recipe"]), steps=facts["step"] + 1, accumulation=2), resume_run=True
    )
    assert resumed.run().step == facts["step"] + 1
