"""What the study found: a row for each run and exposure, seeds together as a table, and the ways as a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch_engram.studies.facts.other_text import ELSEWHERE, REHEARSED
from torch_engram.studies.grid import Line
from torch_engram.studies.report import Draw, Report, Section, origins, spread

_BYTES = 4
"""Of a number that is trained."""
_NAMES = {"untaught": "before", "memory": "memory", "lora": "LoRA", "full": "full"}


@dataclass(frozen=True)
class Row:
    """What a run answered after so many exposures, in shares of the questions, what it took, and where it was run. Of
    the untaught model, nothing was taken."""

    way: str
    exposures: int
    seed: int
    recall: float
    """In trained wordings."""
    paraphrase: float
    """In held-out ones."""
    capitals: float
    elements: float
    rehearsed: float
    """Perplexity of other documents of the kinds that are rehearsed."""
    elsewhere: float
    """Perplexity of kinds of text that are not."""
    read: int
    """Trained bytes that a token reads."""
    trained: int
    """Bytes that teaching changed."""
    seconds: float
    device: str
    versions: str
    code: str
    date: str


def rows_of(lines: Sequence[Line]) -> list[Row]:
    """In the log's order. A way's own name is that of its run that goes furthest, or of the first of these."""
    usual: dict[str, Any] = {}
    for run in sorted((line["run"] for line in lines), key=lambda run: -len(run["exposures"])):
        usual.setdefault(run["way"], run)
    return [_row(line, _label(line["run"], usual[line["run"]["way"]])) for line in lines]


def _row(line: Line, label: str) -> Row:
    result, numbers = line["result"], line["result"].get("numbers", {"read": 0, "trained": 0})
    rehearsed, elsewhere = (
        math.exp(fmean(result["other_text"][name] for name in names)) for names in (REHEARSED, ELSEWHERE)
    )
    return Row(
        label, result["exposures"], line["run"]["seed"], fmean(result["trained"].values()),
        fmean(result["held_out"].values()), result["known"]["capital"], result["known"]["symbol"], rehearsed, elsewhere,
        _BYTES * numbers["read"], _BYTES * numbers["trained"], result.get("seconds", 0.0),
        line["device"], line["versions"], line["code"], line["date"],
    )  # fmt: skip


def _label(run: dict[str, Any], usual: dict[str, Any]) -> str:
    """A way's name, and what sets a run apart from that way's usual one."""
    apart = []
    if run["rates"]["weights"] != usual["rates"]["weights"]:
        apart.append(f"rate {run['rates']['weights']:g}")
    if run["rates"]["rows"] != usual["rates"]["rows"]:
        apart.append(f"rows' rate {run['rates']['rows']:g}")
    if run["rehearsed"] != usual["rehearsed"]:
        apart.append(f"{run['rehearsed']} pieces" if run["rehearsed"] else "no other text")
    if run["told_only"] != usual["told_only"]:
        apart.append("taught at every token")
    return ", ".join([_NAMES[run["way"]], *apart])


HEAD = "way", "seen", "taught", "held out", "capitals", "elements", "near", "far", "read", "trained", "s"
"""Columns of :func:`cells`."""
CAPTION = (
    "Per cent answered after so many exposures: in taught wordings, seen or to come, and in held-out ones; capitals "
    "and elements. Perplexity near, of other documents of the kinds that are rehearsed, and far, of kinds that are "
    "not. MiB that a token reads and that were trained. Seconds of teaching, which runs that share a device stretch. "
    "Of several seeds the mean, and half of what lies between the least and the most."
)


def by_seeds(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed alone, together."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.way, row.exposures), []).append(row)
    return list(found.values())


def cells(seeds: Sequence[Row]) -> tuple[str, ...]:
    """A line of the table, for people, of rows that differ in their seed alone."""
    shares, texts = ("recall", "paraphrase", "capitals", "elements"), ("rehearsed", "elsewhere")
    first, seconds = seeds[0], fmean(row.seconds for row in seeds)
    return (
        first.way, str(first.exposures),
        *(spread([100 * getattr(row, share) for row in seeds], 1) for share in shares),
        *(spread([getattr(row, text) for row in seeds], 2) for text in texts),
        *(f"{size / 2**20:.1f}" if size else "-" for size in (first.read, first.trained)),
        f"{seconds:.0f}" if seconds else "-",
    )  # fmt: skip


def report(lines: Sequence[Line]) -> Report:
    """The ways, by how often a fact was seen. Raises ``ValueError`` where the untaught model has no result."""
    rows = rows_of(lines)
    table = [cells(seeds) for seeds in by_seeds(rows)]
    ways = Section("Ways", head=HEAD, rows=table, figure="facts", draw=draw_ways(rows), caption=CAPTION)
    return Report("facts", "Facts taught to a pretrained model", [ways], [vars(row) for row in rows], origins(lines))


def draw_ways(rows: Sequence[Row]) -> Draw:
    """The ways over exposures: what was learned, and what that did to other text."""
    before = next((row for row in rows if row.way == _NAMES["untaught"]), None)
    if before is None:
        raise ValueError(
            "The log has no result of the untaught model: run the study again, which adds what is missing."
        )
    known, perplexity = before.capitals + before.elements, before.elsewhere
    panels: dict[str, Callable[[Row], float]] = {
        "Trained wordings, % right": lambda row: 100 * row.recall,
        "Held-out wordings, % right": lambda row: 100 * row.paraphrase,
        "Capitals and elements, points": lambda row: 50 * (row.capitals + row.elements - known),
        "Perplexity elsewhere, %": lambda row: 100 * (row.elsewhere / perplexity - 1),
    }
    marks = sorted({row.exposures for row in rows if row.exposures})

    def draw(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 2.8), layout="constrained")
        for axis, (title, value) in zip(axes, panels.items(), strict=True):
            for number, way in enumerate(list(_NAMES.values())[1:]):
                _lines(axis, way, f"C{number}", rows, value)
            axis.set(title=title, xlabel="times seen", xscale="log")
            axis.set_xticks(marks, [str(mark) for mark in marks], minor=False)
            axis.minorticks_off()
        axes[0].legend()
        return figure

    return draw


def _lines(axis: Any, way: str, colour: str, rows: Sequence[Row], value: Callable[[Row], float]) -> None:
    """A way over exposures, with what lies between its seeds; thin, the same at other rates."""
    for label in dict.fromkeys(row.way for row in rows if row.way == way or row.way.startswith(f"{way}, rate")):
        groups = [list(map(value, group)) for group in by_seeds(rows) if group[0].way == label]
        seen = [row.exposures for row, *_ in by_seeds(rows) if row.way == label]
        ends = [[fmean(group) - min(group) for group in groups], [max(group) - fmean(group) for group in groups]]
        look: dict[str, Any] = dict(label=way, marker="o") if label == way else dict(linewidth=0.8, alpha=0.45)
        axis.errorbar(seen, list(map(fmean, groups)), ends, color=colour, markersize=3, capsize=2, **look)
