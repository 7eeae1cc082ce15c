"""Study 1, the recipe: learning rates of the baselines, and how tables are trained, one setting at a time.

Every run is as long as those of the other studies: what leads early is often behind in the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_engram.studies.grid import Line
from torch_engram.studies.report import Report, origins
from torch_engram.studies.study import Study
from torch_engram.studies.sweeps import row_of, sweep_section
from torch_engram.studies.training import TrainingRun
from torch_engram.train import change, get_recipe

Settings = tuple[str, ...]
_ENGRAM = "model.engrams.engram"
BASES = 3
"""Seeds of every base at least, so that what differs by chance is known."""


def _rates(matrices: float, embedding: float, head: float, other: float) -> Settings:
    rates = {"matrices": matrices, "embedding": embedding, "head": head, "other": other, "router": 5e-4}
    return *(f"rates.{name}={rate:g}" for name, rate in rates.items()), "balance_rate=0.01"


def _each(name: str, *values: float) -> list[Settings]:
    return [(f"{name}={value:g}",) for value in values]


def _tables(heads: int, row_dim: int, rows: int) -> Settings:
    return f"{_ENGRAM}.heads={heads}", f"{_ENGRAM}.row_dim={row_dim}", f"{_ENGRAM}.rows_per_head={rows}"


FIRST, SECOND = _rates(4e-3, 4e-3, 2e-3, 4e-3), _rates(8e-3, 6.4e-2, 8e-3, 1.6e-2)
"""Where the sweeps begin, and what the first of them say."""
AROUND_FIRST = [
    *_each("rates.embedding", 1.6e-2, 1e-3, 6.4e-2), *_each("rates.matrices", 2e-3, 8e-3, 1.6e-2),
    *_each("rates.other", 1.6e-2, 1e-3), *_each("rates.head", 8e-3, 5e-4), *_each("rates.router", 2e-3),
]  # fmt: skip
AROUND_SECOND = [
    *_each("rates.embedding", 1.6e-2, 2.56e-1), *_each("rates.matrices", 4e-3, 1.6e-2),
    *_each("rates.other", 4e-3, 6.4e-2), *_each("rates.head", 2e-3, 3.2e-2),
]  # fmt: skip
BALANCE = [*_each("rates.router", 1.25e-4, 2e-3), *_each("balance_rate", 2.5e-3, 4e-2)]
TABLES = [
    *_each("table.lr", 2e-3, 2e-2, 6e-2),
    ("table.optimizer=rowwise_adam",), ("table.optimizer=adagrad", "table.lr=0.06"),
    _tables(1, 32, 872_000), _tables(4, 32, 218_000), _tables(8, 32, 109_000),
    _tables(2, 16, 872_000), _tables(2, 64, 218_000),
    (f"{_ENGRAM}.init_std=0.02",), ("table.weight_decay=0.1",),
]  # fmt: skip
MEMORY = (*_tables(2, 32, 436_000), "table.lr=0.006")
Sweeps = dict[str, tuple[str, Settings, list[Settings]]]
"""By label: a recipe, the base's settings, and what is changed in it, one after the other."""
SMALL: Sweeps = {
    "MoE, first round": ("small-moe", FIRST, AROUND_FIRST),
    "MoE, second round": ("small-moe", SECOND, [*AROUND_SECOND, *BALANCE]),
    "Engram": ("small-engram", (*SECOND, *MEMORY), TABLES),
    "dense": ("small-dense", SECOND, AROUND_SECOND),
}
_SHORT = ("steps=12", "warmup=2", "seq_len=32", "batch_size=4", "model.vocab_size=600", "validation_share=0.1")
TINY: Sweeps = {"Engram": ("tiny", _SHORT, [*_each("table.lr", 2e-2, 0), *_each("rates.embedding", 1e-2)])}


def runs(scale: str, seeds: int) -> list[TrainingRun]:
    """Each model as its base is, and with one thing changed at a time."""
    return [
        TrainingRun(label, change(get_recipe(recipe), [*base, *changed, f"seed={seed}"]), changed)
        for label, (recipe, base, settings) in {"small": SMALL, "tiny": TINY}[scale].items()
        for changed in ((), *settings)
        for seed in range(seeds if changed else max(BASES, seeds))
    ]


def report(lines: Sequence[Line]) -> Report:
    """Every model's settings over what they gave."""
    labels = dict.fromkeys(line["run"]["label"] for line in lines)
    sections = [sweep_section([line for line in lines if line["run"]["label"] == label]) for label in labels]
    return Report("recipe", "The recipe", sections, [row_of(line) for line in lines], origins(lines))


STUDY = Study(("small", "tiny"), runs, report)
