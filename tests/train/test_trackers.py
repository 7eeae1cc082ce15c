"""Metrics in the real trackers: what trackio and TensorBoard read back is what the run wrote to its own file."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from torch_engram.train.metrics import read_metrics

TRACKED = """
import json, sys
from torch_engram.train import Recipe, Trainer
Trainer(Recipe.from_dict(json.loads(sys.argv[1]))).run()
"""
READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([SQLiteStorage.get_runs("torch-engram"), SQLiteStorage.get_logs("torch-engram", "run")]))
"""


def python(program: str, *arguments: str, **environment: str) -> str:
    """In a process of its own: trackers keep threads and files open for as long as theirs lives."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run(make_recipe, tmp_path):
    """Train with a tracker; returns the run's folder."""

    def train(tracker, **environment):
        recipe = make_recipe(tracker=tracker)
        python(TRACKED, json.dumps(recipe.to_dict()), OMP_NUM_THREADS="1", **environment)
        return tmp_path / "runs" / "run"

    return train


def test_trackio(run, tmp_path):
    folder = run("trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    runs, logs = json.loads(python(READ_TRACKIO, TRACKIO_DIR=str(tmp_path / "trackio")).splitlines()[-1])
    assert runs == ["run"]
    written = read_metrics(folder)
    assert len(written) > 6
    assert [{name: line[name] for name in want} for line, want in zip(logs, written, strict=True)] == written


def test_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run("tensorboard")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    found = {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    written = {
        (name, line["step"]): value for line in read_metrics(folder) for name, value in line.items() if name != "step"
    }
    assert found == pytest.approx(written, rel=1e-6) and len(found) > 30
