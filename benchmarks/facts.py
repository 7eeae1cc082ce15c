"""facts-recall, facts-paraphrase, facts-known, facts-perplexity: facts taught to SmolLM2, out of a study's log.

    engram study facts --scale full --device cuda --workers 7 --out docs/results/facts
    python benchmarks/facts.py [--log docs/results/facts]

The study (docs/facts.md) teaches 400 people's facts by a memory, by LoRA and by full fine-tuning. Cases name the way,
its rate where that is not the usual one, and how often each fact was seen; seeds are the samples, and a row's origin is
the log's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from record import record

from torch_engram.studies.facts.report import Row, by_seeds, rows_of
from torch_engram.studies.facts.study import full
from torch_engram.studies.grid import results

LOG = Path(__file__).parents[1] / "docs" / "results" / "facts"
MEASURES: dict[tuple[str, str, str], Callable[[Row, Row], float]] = {
    ("facts-recall", "", "%"): lambda row, before: 100 * row.recall,
    ("facts-paraphrase", "", "%"): lambda row, before: 100 * row.paraphrase,
    ("facts-known", "-capitals", "points lost"): lambda row, before: 100 * (before.capitals - row.capitals),
    ("facts-known", "-elements", "points lost"): lambda row, before: 100 * (before.elements - row.elements),
    ("facts-perplexity", "-elsewhere", "%"): lambda row, before: 100 * (row.elsewhere / before.elsewhere - 1),
    ("facts-perplexity", "-rehearsed", "%"): lambda row, before: 100 * (row.rehearsed / before.rehearsed - 1),
}
"""Claim, the case's ending and unit, and what is measured of a row against the untaught model's."""


def case_of(row: Row) -> str:
    """Such as ``memory-16`` or ``lora-rate-0.002-16``."""
    return f"{row.way.lower().replace(',', '').replace(' ', '-')}-{row.exposures}"


def origin_of(seeds: list[Row]) -> tuple[str, str, str, str]:
    """Device, versions, commit and date, which an ``assert`` wants to be one for all."""
    (found,) = {(row.device, row.versions, row.code.split()[-1], row.date) for row in seeds}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Record what the log has of every run that rehearses and tells as the study's usual ones do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=LOG, help="a folder of the study's")
    log = parser.parse_args(arguments).log
    usual = [run for run in full() if run.way == "untaught" or (run.rehearsed and run.told_only)]
    before, *taught = rows_of(results(usual, log))
    assert before.way == "before", f"{log} has no untaught model"
    for seeds in by_seeds(taught):
        for (claim, ending, unit), value in MEASURES.items():
            samples = [value(row, before) for row in seeds]
            record(claim, case_of(seeds[0]) + ending, samples, unit, seen=origin_of(seeds))


if __name__ == "__main__":
    main()
