"""The study's results: a row for each run and exposure, as a table, as CSV, and the three ways as a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch_engram.durable import replacing
from torch_engram.studies.grid import Line

CSV_FILE, TABLE, FIGURE = "facts.csv", "facts.md", "facts.svg"
_BYTES = 4
"""Of a number that is trained."""
_NAMES = {"untaught": "before", "memory": "memory", "lora": "LoRA", "full": "full"}


@dataclass(frozen=True)
class Row:
    """Shares of questions answered, and what it took. Of the untaught model, nothing was taken."""

    way: str
    exposures: int
    recall: float
    """In trained wordings."""
    paraphrase: float
    """In held-out ones."""
    capitals: float
    elements: float
    perplexity: float
    read: int
    """Trained bytes that a token reads."""
    trained: int
    """Bytes that teaching changed."""
    seconds: float


def rows_of(lines: Sequence[Line]) -> list[Row]:
    """In the log's order."""
    first: dict[str, Any] = {line["run"]["way"]: line["run"] for line in reversed(lines)}
    return [_row(line, _label(line["run"], first[line["run"]["way"]])) for line in lines]


def _row(line: Line, label: str) -> Row:
    result, numbers = line["result"], line["result"].get("numbers", {"read": 0, "trained": 0})
    return Row(
        label, result["exposures"], fmean(result["trained"].values()), fmean(result["held_out"].values()),
        result["known"]["capital"], result["known"]["symbol"], result["perplexity"],
        _BYTES * numbers["read"], _BYTES * numbers["trained"], result.get("seconds", 0.0),
    )  # fmt: skip


def _label(run: dict[str, Any], usual: dict[str, Any]) -> str:
    """A way's name, and what sets a run apart from the first one of that way."""
    apart = []
    if run["rates"] != usual["rates"]:
        apart.append(f"rate {run['rates']['weights']:g}")
    if run["rehearsed"] != usual["rehearsed"]:
        apart.append("no other text")
    if run["told_only"] != usual["told_only"]:
        apart.append("taught at every token")
    return ", ".join([_NAMES[run["way"]], *apart])


HEAD = "way", "seen", "taught", "held out", "capitals", "elements", "perpl.", "read", "trained", "s"
"""Columns of :func:`cells`."""
CAPTION = (
    "Per cent answered after so many exposures: in taught wordings, seen or to come, and in held-out ones; capitals "
    "and elements; perplexity of other documents of the kind that is rehearsed; MiB that a token reads and that were "
    "trained; seconds of teaching, which runs that share a device stretch."
)


def cells(row: Row) -> tuple[str, ...]:
    """A row for people."""
    shares = (f"{100 * share:.1f}" for share in (row.recall, row.paraphrase, row.capitals, row.elements))
    sizes = (f"{size / 2**20:.1f}" if size else "-" for size in (row.read, row.trained))
    seconds = f"{row.seconds:.0f}" if row.seconds else "-"
    return row.way, str(row.exposures), *shares, f"{row.perplexity:.2f}", *sizes, seconds


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [HEAD, ("---", *("---:" for _ in HEAD[1:])), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{CAPTION}\n"


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
        "Perplexity of other text, %": lambda row: 100 * (row.perplexity / before.perplexity - 1),
    }
    with pyplot.rc_context({"svg.hashsalt": "facts", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 2.8), layout="constrained")
        for axis, (title, value) in zip(axes, panels.items(), strict=True):
            for way in list(_NAMES.values())[1:]:
                seen = [row for row in rows if row.way == way]
                axis.plot([row.exposures for row in seen], list(map(value, seen)), marker="o", markersize=3, label=way)
            axis.set(title=title, xlabel="times seen", xscale="log")
            marks = sorted({row.exposures for row in rows if row.exposures})
            axis.set_xticks(marks, [str(mark) for mark in marks], minor=False)
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return drawn.getvalue()
