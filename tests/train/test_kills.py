"""``kill -9`` of a run at random points, over and over: what it said is saved is there, and it ends where one that was
never killed does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Forks children that train, so that torch is imported once. A child tells of every save when it is over; each is killed
# some saves later, at a random moment of a save, a step or its start, and what it left is compared with the checkpoint
# of the same step in a run that was not killed.
KILLER = """
import json, os, random, signal, sys, time
import torch
import torch._dynamo
torch.set_num_threads(1)
from pathlib import Path
from torch_engram.memory import open_bank
from torch_engram.optim import RowAdam
from torch_engram.stores import make_keys
from torch_engram.train import Recipe, Trainer
from torch_engram.train.build import build_text
from torch_engram.train.checkpoint import checkpoints, read_facts

recipe, whole, kills = Recipe.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
text = build_text(recipe)
folder = Path(recipe.out) / recipe.name
draw = random.Random(3)


def train(tells):
    trainer = Trainer(recipe, resume_run=bool(checkpoints(folder)), text=text)
    save = trainer.save

    def save_and_tell():
        path = save()
        os.write(tells, f"{trainer.step}\\n".encode())
        return path

    trainer.save = save_and_tell
    trainer.run()


def content(path):
    facts = read_facts(path)  # which compares checksums, as open_bank does
    state = {name: (path / name).read_bytes() for name in facts["sha256"]}
    for name in facts["banks"]:
        bank = open_bank(path / f"memory-{name}", optimizer=RowAdam)  # with the moments
        for table in bank.tables:
            keys = make_keys(table.space, torch.arange(table.rows))
            state[f"rows of {name}, table {table.space}"] = bank.source(table).store.fetch(keys).numpy().tobytes()
    return state


told = 0  # the newest step that was said to be saved
pace, slowest_start = 0.05, 0.5
for number in range(1, kills + 1):
    hears, tells = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if not child:
        try:
            train(tells)
        finally:
            os._exit(0)
    os.close(tells)
    reports = os.fdopen(hears, "rb")
    saves = draw.randrange(4)
    for heard in range(saves):
        before, line = time.monotonic(), reports.readline()
        assert line, "the run ended by itself"
        told = int(line)
        if heard:
            pace = time.monotonic() - before
        else:
            slowest_start = time.monotonic() - begun
    time.sleep(draw.uniform(0, 1.5 * pace if saves else slowest_start))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run ended by itself"
    told = max([told, *map(int, reports.read().split())])
    visible = sorted(folder.glob("step-*"))
    assert visible == checkpoints(folder), visible  # none is half-written
    found = int(visible[-1].name.removeprefix("step-")) if visible else 0
    assert found >= told, f"kill {number}: step {told} was said to be saved, and step {found} is the newest"
    for path in visible:
        mine, theirs = content(path), content(whole / path.name)
        assert mine.keys() == theirs.keys()
        assert not [name for name in mine if mine[name] != theirs[name]], path
    left = len(list(folder.glob(".step-*")))
    print(f"kill {number}: after {saves} saves, said to be saved {told}, found {found}, half-written and hidden {left}")
"""

SETTINGS = dict(save_every=2, keep=2, eval_every=30, accumulation=1)


@pytest.mark.parametrize(
    "kills, placement", [(3, "host"), (3, "disk"), pytest.param(50, "host", marks=pytest.mark.slow)]
)
def test_kill_9_loses_nothing_that_was_said_to_be_saved(
    make_recipe, make_trainer, state_of, assert_same, lines_of, kills, placement
):
    """Tables are prefetched. The newest checkpoint is never older than the last report; every one that is there holds
    what an undisturbed run's of that step does, rows and moments, too; the run ends as that one does."""
    settings = {**SETTINGS, "steps": 10 * kills, "table": {"placement": placement, "prefetch": 2}}
    whole = make_trainer(**{**settings, "name": "whole", "keep": settings["steps"]})
    whole.run()
    recipe = make_recipe(**settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(recipe.to_dict()), str(whole.folder), str(kills)],
        capture_output=True, text=True, env=environment, timeout=1200,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == kills
    resumed = make_trainer(resume_run=True, **settings)
    step = resumed.step
    assert f"found {step}," in lines[-1]
    resumed.run()
    last = settings["steps"]
    kept = [name for name in os.listdir(resumed.folder) if not name.startswith("rows-")]
    assert sorted(kept) == ["metrics.jsonl", f"step-{last - 2:08d}", f"step-{last:08d}"]
    assert_same(state_of(resumed), state_of(whole))
    assert lines_of(resumed) == lines_of(whole)
    print(found.stdout, end="")
    print(f"{kills} kills, the last resume at step {step}: after {last} steps every bit as without a kill.")
