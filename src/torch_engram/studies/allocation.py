"""Study 2, allocation: at equal total and active parameters and tokens, how much of what is sparse goes into tables.

Beside each number of experts stand the same experts without tables, and three controls of the tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch_engram.models import DecoderConfig, MoEConfig
from torch_engram.models.accounting import account
from torch_engram.studies.controls import ONE_ROW, SHUFFLED
from torch_engram.studies.curves import curve_section, curves
from torch_engram.studies.fits import lowest
from torch_engram.studies.grid import Line
from torch_engram.studies.recipe import MEMORY, SECOND
from torch_engram.studies.report import Report, origins
from torch_engram.studies.study import Study
from torch_engram.studies.sweeps import row_of
from torch_engram.studies.training import TrainingRun
from torch_engram.train import Recipe, change, get_recipe

SMALL = ("small-engram", (*SECOND, *MEMORY), 56, (50, 43, 36, 29, 22, 14))
"""Recipe, settings, experts a layer without tables, and with them."""
_HALF = ("hidden=384", "layers=6", "heads=6", "moe.expert_hidden=288", "moe.shared_hidden=288")
HALF = (SMALL[0], (*SMALL[1], *(f"model.{each}" for each in _HALF)), *SMALL[2:])
"""Two fifths of the active parameters."""
_SHORT = ("steps=6", "warmup=1", "seq_len=32", "batch_size=4", "model.vocab_size=600", "validation_share=0.1",
          "model.hidden=32", "model.layers=5", "model.heads=2", "model.moe.expert_hidden=16",
          "model.moe.shared_hidden=32", "model.engrams.engram.row_dim=4")  # fmt: skip
SCALES = {"small": SMALL, "half": HALF, "tiny": ("small-engram", _SHORT, 8, (6, 4))}
WITHOUT, FROZEN, TABLES = "no tables", "tables never trained", "tables"
CONTROLS = (WITHOUT, ONE_ROW, SHUFFLED, FROZEN)


def allocated(whole: Recipe, experts: int, memory: Recipe) -> Recipe:
    """With fewer experts than the ``whole`` has, and the tables of ``memory`` as large as what they leave of its total;
    the shared expert pays for what is active of the memory, in eights, as matrix products like it."""
    engram, model = memory.model.engrams["engram"], replace(memory.model, moe=_experts(whole.model, experts))
    goal, unit = account(whole.model), 3 * model.hidden * model.layers
    moe = _experts(model, experts, less_shared=8 * round((account(model).active - goal.active) / (8 * unit)))
    model = replace(model, moe=moe)
    rows = (goal.total - account(model).total + account(model).tables) / (engram.embedding_dim * len(engram.layers))
    return replace(memory, model=replace(model, engrams={"engram": replace(engram, rows_per_head=round(rows))}))


def _experts(model: DecoderConfig, experts: int, less_shared: int = 0) -> MoEConfig:
    assert model.moe is not None
    return replace(model.moe, experts=experts, shared_hidden=model.moe.shared_hidden - less_shared)


def _runs(scale: str, seed: int) -> Iterator[TrainingRun]:
    recipe, settings, most, fewer = SCALES[scale]
    memory = change(get_recipe(recipe), [*settings, f"seed={seed}"])
    whole = replace(memory, model=replace(memory.model, engrams={}, moe=_experts(memory.model, most)))
    yield TrainingRun(TABLES, whole)
    for experts in fewer:
        run = TrainingRun(TABLES, allocated(whole, experts, memory))
        yield run
        if seed == 0:
            yield TrainingRun(WITHOUT, replace(whole, model=replace(whole.model, moe=_experts(whole.model, experts))))
            yield replace(run, label=ONE_ROW, control=ONE_ROW)
            yield replace(run, label=SHUFFLED, control=SHUFFLED)
            frozen = ["table.lr=0", "model.engrams.engram.init_std=0.02"]
            yield replace(run, label=FROZEN, recipe=change(run.recipe, frozen))


def runs(scale: str, seeds: int) -> list[TrainingRun]:
    """Every allocation with every seed; the controls with one."""
    return [run for seed in range(seeds) for run in _runs(scale, seed)]


def report(lines: Sequence[Line]) -> Report:
    """The loss over the experts' share of what is sparse, its lowest point, and the controls where their tables are."""
    shares = {_experts_of(line): line["result"]["sizes"]["rho"] for line in lines if line["run"]["label"] == TABLES}
    found = curves([line for line in lines if _experts_of(line) in shares], lambda line: shares[_experts_of(line)])
    tables = next((curve for curve in found if curve.label == TABLES), None)
    losses, words = [] if tables is None else tables.by_seed(), []
    if tables is not None and len(losses) > 2 and len(tables.points) > 2:
        words = [f"A parabola is lowest where experts have {lowest(sorted(tables.points), losses)} of what is sparse."]
    section = curve_section("Allocation", found, "experts' share", tuple(words), reference=tables)
    return Report("allocation", "Experts or tables", [section], [row_of(line) for line in lines], origins(lines))


def _experts_of(line: Line) -> int:
    experts: int = line["run"]["recipe"]["model"]["moe"]["experts"]
    return experts


STUDY = Study(("small", "half", "tiny"), runs, report, seeds=3, packages=("matplotlib", "scipy"))
