"""The study's results: a row for each run and exposure as CSV, seeds together as a table, and the ways as a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch_engram.durable import replacing
from torch_engram.studies.facts.other_text import ELSEWHERE, REHEARSED
from torch_engram.studies.grid import Line

CSV_FILE, TABLE, FIGURE = "facts.csv", "facts.md", "facts.svg"
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
        *(_spread([100 * getattr(row, share) for row in seeds], 1) for share in shares),
        *(_spread([getattr(row, text) for row in seeds], 2) for text in texts),
        *(f"{size / 2**20:.1f}" if size else "-" for size in (first.read, first.trained)),
        f"{seconds:.0f}" if seconds else "-",
    )  # fmt: skip


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ±{(max(values) - min(values)) / 2:.{digits}f}"


def where(rows: Sequence[Row]) -> str:
    """Which machines and which code the rows come from, a line for each."""
    return "\n".join(dict.fromkeys(f"{row.device}; {row.versions}; {row.code}; {row.date}" for row in rows))


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [HEAD, ("---", *("---:" for _ in HEAD[1:])), *map(cells, by_seeds(rows))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{CAPTION}\n\n{where(rows)}\n"


def write_report(rows: Sequence[Row], out: Path) -> None:
    """``facts.csv``, ``facts.md`` and ``facts.svg`` in a folder."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row.__dataclass_fields__)
    writer.writerows(vars(row).values() for row in rows)
    with replacing(out / CSV_FILE) as file:
        file.write(text.getvalue().encode())
    for name, page in ((TABLE, markdown(rows)), (FIGURE, draw(rows))):
        with replacing(out / name) as file:
            file.write(page.encode())


def draw(rows: Sequence[Row]) -> str:
    """The ways over exposures, as SVG: what was learned, and what that did to other text."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    before = next(row for row in rows if row.way == _NAMES["untaught"])
    known = before.capitals + before.elements
    panels: dict[str, Callable[[Row], float]] = {
        "Trained wordings, % right": lambda row: 100 * row.recall,
        "Held-out wordings, % right": lambda row: 100 * row.paraphrase,
        "Capitals and elements, points": lambda row: 50 * (row.capitals + row.elements - known),
        "Perplexity elsewhere, %": lambda row: 100 * (row.elsewhere / before.elsewhere - 1),
    }
    marks = sorted({row.exposures for row in rows if row.exposures})
    with pyplot.rc_context({"svg.hashsalt": "facts", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 2.8), layout="constrained")
        for axis, (title, value) in zip(axes, panels.items(), strict=True):
            for number, way in enumerate(list(_NAMES.values())[1:]):
                _lines(axis, way, f"C{number}", rows, value)
            axis.set(title=title, xlabel="times seen", xscale="log")
            axis.set_xticks(marks, [str(mark) for mark in marks], minor=False)
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return drawn.getvalue()


def _lines(axis: Any, way: str, colour: str, rows: Sequence[Row], value: Callable[[Row], float]) -> None:
    """A way over exposures, with what lies between its seeds; thin, the same at other rates."""
    for label in dict.fromkeys(row.way for row in rows if row.way == way or row.way.startswith(f"{way}, rate")):
        groups = [list(map(value, group)) for group in by_seeds(rows) if group[0].way == label]
        seen = [row.exposures for row, *_ in by_seeds(rows) if row.way == label]
        spread = [[fmean(group) - min(group) for group in groups], [max(group) - fmean(group) for group in groups]]
        look: dict[str, Any] = dict(label=way, marker="o") if label == way else dict(linewidth=0.8, alpha=0.45)
        axis.errorbar(seen, list(map(fmean, groups)), spread, color=colour, markersize=3, capsize=2, **look)
