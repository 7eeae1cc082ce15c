"""Study 3, more memory at fixed compute: the loss over a table's rows, for four ways to use n-grams.

A network of 29 experts stays as it is; its tables grow over two and a half decades. Every way has the same rows of the
same width in all, and a learning rate of its own, swept at one size (``RATES``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log10

from torch_engram.studies.curves import Curve, curve_section, curves
from torch_engram.studies.fits import power, straight
from torch_engram.studies.grid import Line
from torch_engram.studies.recipe import MEMORY, SECOND
from torch_engram.studies.report import Report, origins
from torch_engram.studies.study import Study
from torch_engram.studies.sweeps import row_of
from torch_engram.studies.training import TrainingRun
from torch_engram.studies.ways import with_rows
from torch_engram.train import change, get_recipe

ROWS = (14_000, 44_000, 140_000, 440_000, 1_400_000, 4_400_000)
"""Of all tables of a network together."""
SWEPT, RATES = 440_000, (2e-3, 6e-3, 2e-2, 6e-2)
BEST = {"Engram": 6e-3, "addition": 6e-3, "over-encoding": 6e-3, "per-layer": 6e-3}
"""Where the sweeps begin; the best of :data:`RATES` at :data:`SWEPT` rows are to stand here, and have not been run."""
_LAYERS = {"Engram": (1, 4), "addition": (1, 4), "over-encoding": (0,), "per-layer": (0, 1, 2, 3, 4, 5, 6, 7)}
_SHORT = ("steps=4", "warmup=1", "seq_len=32", "batch_size=4", "model.vocab_size=600", "validation_share=0.1",
          "model.hidden=32", "model.heads=2", "model.moe.expert_hidden=16", "model.moe.shared_hidden=32",
          "model.moe.experts=4", "model.engrams.engram.row_dim=4")  # fmt: skip
SCALES = {"small": (ROWS, SWEPT, RATES, ()), "tiny": ((400, 1_200, 4_000), 1_200, (6e-3, 2e-2), _SHORT)}
ALONE = "no tables"


def _run(label: str, rows: int, rate: float, seed: int, shared: Sequence[str]) -> TrainingRun:
    name, changed = "model.engrams.engram", () if rate == BEST[label] else (f"table.lr={rate:g}",)
    settings = [*SECOND, *MEMORY, "model.moe.experts=29", *shared, f"seed={seed}", f"table.lr={rate:g}",
                f"{name}.layers={','.join(map(str, _LAYERS[label]))}",
                f"{name}.init_std={0.02 if label == 'per-layer' else 0}"]  # fmt: skip
    recipe = change(get_recipe("small-engram"), settings)
    asked = with_rows(recipe.model.engrams["engram"], rows)
    model = replace(recipe.model, engrams={"engram": asked})
    return TrainingRun(label, replace(recipe, model=model), changed, way="" if label == "Engram" else label)


def runs(scale: str, seeds: int) -> list[TrainingRun]:
    """The network alone, each way's rates at one size, and then every size at the best of them."""
    sizes, swept, rates, shared = SCALES[scale]
    alone = change(get_recipe("small-moe"), [*SECOND, "model.moe.experts=29"])
    found = [TrainingRun(ALONE, replace(alone, seed=seed)) for seed in range(seeds if scale == "small" else 0)]
    found += [_run(label, swept, rate, 0, shared) for label, best in BEST.items() for rate in rates if rate != best]
    return found + [
        _run(label, rows, rate, seed, shared) for seed in range(seeds) for label, rate in BEST.items() for rows in sizes
    ]


def rows_of(line: Line) -> float:
    """Of all tables together."""
    width = line["run"]["recipe"]["model"]["engrams"]["engram"]["row_dim"]
    rows: float = line["result"]["sizes"]["tables"] / width
    return rows


def said(curve: Curve) -> str:
    """A straight line through a curve's points over the logarithm of rows, and a power law."""
    rows, losses = zip(*((x, loss) for x in curve.points for loss in curve.losses(x).values()), strict=True)
    line = straight([log10(x) for x in rows], losses)
    text = f"{curve.label}: {line.slope} nats a decade of rows, R² {line.r_squared:.3f}"
    if len(rows) > 4 and (law := power(rows, losses)) is not None:
        text += f"; as a power law, exponent {law.exponent} above {law.floor:.3f} nats, R² {law.r_squared:.3f}"
    return f"{text}."


def report(lines: Sequence[Line]) -> Report:
    """Losses over rows, with fits, and over rates, at the rows where these were changed."""
    tables = [line for line in lines if line["run"]["label"] != ALONE]
    sizes = curves([line for line in tables if not line["run"]["changed"]], rows_of)
    swept = {(line["run"]["label"], rows_of(line)) for line in tables if line["run"]["changed"]}
    beside = [line for line in tables if line["run"]["recipe"]["seed"] == 0]
    at_swept = [line for line in beside if (line["run"]["label"], rows_of(line)) in swept]
    rates = curves(at_swept, lambda line: line["run"]["recipe"]["table"]["lr"])
    words = [said(curve) for curve in sizes if len(curve.points) > 2]
    words += [f"Without tables: {loss:.3f}." for loss in _losses(lines, ALONE)]
    sections = [
        curve_section("Rows", sizes, "rows", tuple(words), reference=sizes[0] if sizes else None, log=True),
        curve_section("Rates", rates, "learning rate of rows", log=True),
    ]
    return Report("slots", "More memory at fixed compute", sections, [row_of(line) for line in lines], origins(lines))


def _losses(lines: Sequence[Line], label: str) -> list[float]:
    found = [line["result"]["validation"] for line in lines if line["run"]["label"] == label]
    return [loss for loss in found if loss is not None]


STUDY = Study(("small", "tiny"), runs, report, packages=("matplotlib", "scipy"))
