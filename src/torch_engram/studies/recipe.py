"""Study 1, the recipe: learning rates of the baselines, and how tables are trained, one setting at a time.

Every run is as long as those of the other studies: what leads early is often behind in the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_engram.studies.grid import Line
from torch_engram.studies.report import Report, Section, origins
from torch_engram.studies.study import Study
from torch_engram.studies.sweeps import HEAD, cells, draw_sweeps, row_of, variants
from torch_engram.studies.training import TrainingRun
from torch_engram.train import change, get_recipe

Settings = tuple[str, ...]
_ENGRAM = "model.engrams.engram"
BASES = 3
"""Seeds of every base at least, so that what differs by chance is known."""


def _each(name: str, *values: float) -> list[Settings]:
    return [(f"{name}={value:g}",) for value in values]


def _tables(heads: int, row_dim: int, rows: int) -> Settings:
    return f"{_ENGRAM}.heads={heads}", f"{_ENGRAM}.row_dim={row_dim}", f"{_ENGRAM}.rows_per_head={rows}"


BACKBONE = [
    *_each("rates.embedding", 1.6e-2, 1e-3, 6.4e-2),
    *_each("rates.matrices", 8e-3, 2e-3, 1.6e-2),
    *_each("rates.other", 1.6e-2, 1e-3),
    *_each("rates.head", 8e-3, 5e-4),
]
EXPERTS = [*_each("rates.router", 2e-3, 1.25e-4), *_each("balance_rate", 4e-2, 2.5e-3)]
TABLES = [
    *_each("table.lr", 2e-2, 2e-3, 6e-2),
    ("table.optimizer=rowwise_adam",), ("table.optimizer=adagrad", "table.lr=0.06"),
    _tables(1, 32, 872_000), _tables(4, 32, 218_000), _tables(8, 32, 109_000),
    _tables(2, 16, 872_000), _tables(2, 64, 218_000),
    (f"{_ENGRAM}.init_std=0.02",), ("table.weight_decay=0.1",),
]  # fmt: skip
SMALL = {
    "MoE": ("small-moe", [*BACKBONE, *EXPERTS]),
    "Engram": ("small-engram", [*TABLES, *BACKBONE[:4]]),
    "dense": ("small-dense", BACKBONE),
}
TINY = {"Engram": ("tiny", [*_each("table.lr", 2e-2, 0), *_each("rates.embedding", 1e-2)])}
_SHORT = ("steps=12", "warmup=2", "seq_len=32", "batch_size=4", "model.vocab_size=600", "validation_share=0.1")
SCALES = {"small": (SMALL, ()), "tiny": (TINY, _SHORT)}


def runs(scale: str, seeds: int) -> list[TrainingRun]:
    """Each model as its recipe is, and with one thing changed at a time."""
    models, shared = SCALES[scale]
    return [
        TrainingRun(label, change(get_recipe(recipe), [*shared, *changed, f"seed={seed}"]))
        for label, (recipe, settings) in models.items()
        for changed in ((), *settings)
        for seed in range(seeds if changed else max(BASES, seeds))
    ]


def report(lines: Sequence[Line]) -> Report:
    """Every model's settings over what they gave."""
    sections = []
    for label in dict.fromkeys(line["run"]["label"] for line in lines):
        found = variants([line for line in lines if line["run"]["label"] == label])
        sections.append(
            Section(
                label, head=HEAD, rows=[cells(one, found[0]) for one in found],
                figure=f"recipe-{label.lower()}", draw=draw_sweeps(found),
                caption="Nats a token of held-out text as one setting changes, the others as in the base; of several "
                "seeds the mean, and half of what lies between the least and the most.",
            )
        )  # fmt: skip
    return Report("recipe", "The recipe", sections, [row_of(line) for line in lines], origins(lines))


STUDY = Study(("small", "tiny"), runs, report)
