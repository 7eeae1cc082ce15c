"""What a study of pretraining is, and where they are found: each is a file that says which runs there are and what is
reported of them."""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_engram.config import nearest
from torch_engram.studies import STUDIES
from torch_engram.studies.grid import Line
from torch_engram.studies.report import ONE_GRID, Report
from torch_engram.studies.training import TrainingRun


@dataclass(frozen=True)
class Study:
    """A grid of trainings, and its report. ``STUDY`` of a study's file is one."""

    scales: tuple[str, ...]
    """Sizes that it can be run at, the usual one first."""
    runs: Callable[[str, int], Sequence[TrainingRun]]
    """The runs of a scale with so many seeds, the most telling first."""
    report: Callable[[Sequence[Line]], Report]
    """What the results of a log say, of whichever of its runs have ended."""
    seeds: int = 1
    """How many, unless somebody asks for others."""
    packages: tuple[str, ...] = ("matplotlib",)
    """What its report needs, looked for before anything is run."""

    def grid(self, scale: str, seeds: int | None = None) -> list[TrainingRun]:
        """Its runs, with as many seeds as it needs for None. Raises ``ValueError`` for a scale that there is not."""
        if scale not in self.scales:
            raise ValueError(f"There is no scale {scale!r}: {nearest(scale, self.scales)}")
        return list(self.runs(scale, self.seeds if seeds is None else seeds))


def find_study(name: str) -> Study:
    """The study of this name, or of a file ``name.py``. Raises ``ValueError`` where there is none."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ValueError(f"There is no file {name}: give a study's file, or one of {', '.join(STUDIES)}.")
        found = runpy.run_path(name).get("STUDY")
        if not isinstance(found, Study):
            raise ValueError(f"{name} has no STUDY: let it hold a torch_engram.studies.study.Study of that name.")
        return found
    if name not in STUDIES:
        raise ValueError(f"There is no study {name!r}: {nearest(name, STUDIES)}")
    study: Study = importlib.import_module(f"torch_engram.studies.{name}").STUDY
    return study


def packages_of(name: str) -> tuple[str, ...]:
    """What the report of a study needs."""
    return ("matplotlib",) if name == "facts" else find_study(name).packages


def report_of(name: str) -> Callable[[Sequence[Line]], Report]:
    """What reports a log, by the study that its lines name. Raises ``ValueError`` where there is none."""
    if name == "facts":  # trains no model from its start, so it is no Study
        from torch_engram.studies.facts.report import report

        return report
    study = find_study(name)

    def of_one_text(lines: Sequence[Line]) -> Report:
        texts = {line["run"]["text"] for line in lines}
        if len(texts) > 1:
            raise ValueError(f"This log holds runs on {len(texts)} texts, which no table tells apart: {ONE_GRID}")
        return study.report(lines)

    return of_one_text
