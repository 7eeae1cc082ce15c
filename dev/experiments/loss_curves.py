"""Whether speed costs loss: the curves of ``small-engram`` as it trains on a GPU beside those of its slow forms.

PYTHONPATH=src python dev/experiments/loss_curves.py FOLDER [STEPS]

Three forms of one run, three seeds each: *fast* (bf16, kernels, compiled, captured), *naive* (bf16 without
any of these) and *exact* (naive in fp32, residual stream and experts too). 8,192 tokens a step. Some runs share
the GPU, so nothing here is a speed. Writes ``loss-curves.csv``, form, seed and the mean loss of every 20 steps (of a
run that was cut off those that it took), and prints the mean of each run's last 60 steps.
"""

from __future__ import annotations

import csv
import itertools
import os
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch_engram.kernels import naive
from torch_engram.train.build import build_text
from torch_engram.train.loop import Trainer
from torch_engram.train.recipes import get_recipe

FORMS = {
    "fast": {"dtype": "bf16", "compile": True},
    "naive": {"dtype": "bf16", "compile": False, "capture": False},
    "exact": {"dtype": "fp32", "compile": False, "capture": False},
}
SEEDS, MEAN, LAST = (0, 1, 2), 20, 60
TOGETHER = (("fast", "naive"), ("exact",))
"""Forms whose runs share the GPU: more do not fit into 80 GB."""


def train(folder: Path, form: str, seed: int, steps: int) -> None:
    """One run; its losses, one a line, go to a file of its own."""
    recipe = replace(
        get_recipe("small-engram"), name=f"{form}-{seed}", seed=seed, out=str(folder), cache=str(folder / "cache"),
        batch_size=8, steps=steps, warmup=20, **FORMS[form],
    )  # fmt: skip
    trainer = Trainer(recipe)
    trainer.decoder.train()
    with nullcontext() if form == "fast" else naive(), open(folder / f"{form}-{seed}.txt", "w") as file:
        for _ in range(steps):
            print(float(trainer.train_step()[0]), file=file, flush=True)


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 240
    if len(sys.argv) > 3:
        train(folder, sys.argv[3], int(sys.argv[4]), steps)
        return
    folder.mkdir(parents=True, exist_ok=True)
    build_text(replace(get_recipe("small-engram"), cache=str(folder / "cache")))  # once for all
    command, environment = [sys.executable, __file__, str(folder), str(steps)], {**os.environ, "OMP_NUM_THREADS": "1"}
    for forms in TOGETHER:
        running = [subprocess.Popen([*command, form, str(seed)], env=environment) for form in forms for seed in SEEDS]
        for process in running:
            process.wait()
        write(folder)


def write(folder: Path) -> None:
    """The table of what was trained so far, and its ends."""
    with open(folder / "loss-curves.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("form", "seed", "step", "loss"))
        for form, seed in itertools.product(FORMS, SEEDS):
            run = folder / f"{form}-{seed}.txt"
            losses = [float(line) for line in run.read_text().split()] if run.exists() else []
            for stop in range(MEAN, len(losses) + 1, MEAN):
                writer.writerow((form, seed, stop, f"{statistics.mean(losses[stop - MEAN : stop]):.4f}"))
            if losses:
                print(
                    f"{form} {seed}: last {LAST} of {len(losses)} steps {statistics.mean(losses[-LAST:]):.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
