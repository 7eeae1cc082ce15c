"""Find the demo's learning rates, its baselines' as carefully as its own: a grid for each of the three runs.

    python dev/tune_demo.py prepare                   # tokenise once
    python dev/tune_demo.py run WORKER WORKERS OUT    # this worker's share of the grid, a CSV of its own

The losses are those of the demo's own models, batches and steps; a GPU may do it. This grid gave dev/tuning/demo-3.csv.
Before it, with 220 steps, demo-1.csv came from matrices 2e-3 to 1.6e-2, embedding 4e-3 to 1.6e-2, tables 5e-3 to 2e-2
(the Engram run without matrices at 2e-3), and demo-2.csv from matrices 8e-3 to 3.2e-2, embedding 1.6e-2 to 6.4e-2.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import sys
import time
from pathlib import Path

import torch

from torch_engram.studies.demo import demo_recipe, demo_recipes
from torch_engram.train import Rates, TableRecipe, Trainer
from torch_engram.train.build import build_text

FOLDER = Path("/tmp/tune-demo")
MATRICES = (4e-3, 8e-3, 1.6e-2)
EMBEDDING = (6.4e-2, 1.28e-1, 2.56e-1)
TABLE = (1e-2, 2e-2, 4e-2)
HEADER = ("run", "matrices", "embedding", "table", "nats", "tokens", "seconds")


def grid() -> list[tuple[str, float, float, float]]:
    plain = [(run, m, e, 0.0) for run in ("moe", "dense") for m, e in itertools.product(MATRICES, EMBEDDING)]
    return plain + [("engram", m, e, t) for m, e, t in itertools.product(MATRICES, EMBEDDING, TABLE)]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared = dataclasses.replace(
        demo_recipe(FOLDER), device=device, validation_share=0.02, eval_every=10_000, log_every=1000
    )
    text = build_text(shared)
    if sys.argv[1] == "prepare":
        return
    worker, workers, out = int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    recipes = demo_recipes(shared, text)
    with open(out / f"tune-{worker}.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(HEADER)
        for number, (run, matrices, embedding, table) in list(enumerate(grid()))[worker::workers]:
            rates = Rates(matrices=matrices, embedding=embedding, other=embedding)
            changes = {"rates": rates, "table": TableRecipe(lr=table), "name": f"{number}"}
            begun = time.perf_counter()
            outcome = Trainer(dataclasses.replace(recipes[run], **changes), text=text).run()
            assert outcome.score is not None
            seconds = time.perf_counter() - begun
            rows.writerow(
                (run, matrices, embedding, table, f"{outcome.score.nats:.4f}", outcome.score.tokens, f"{seconds:.1f}")
            )
            file.flush()


if __name__ == "__main__":
    main()
