"""A study's report: figures as SVG and PNG, tables as Markdown and CSV, and all of it as one HTML page.

A study says what is in it as a :class:`Report`; how that is written is the same for all.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from torch_engram.analysis.page import page, section, table
from torch_engram.durable import replacing
from torch_engram.studies.grid import Line

Draw = Callable[[Any], Any]
"""From ``matplotlib.pyplot`` to a figure."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, all of it optional."""

    heading: str
    words: tuple[str, ...] = ()
    """Paragraphs."""
    head: tuple[str, ...] = ()
    """Columns of its table."""
    rows: Sequence[Sequence[str]] = ()
    figure: str = ""
    """Its figure's file, without an ending."""
    draw: Draw | None = None
    caption: str = ""


@dataclass(frozen=True)
class Report:
    """What a study found."""

    name: str
    """Of its files."""
    title: str
    sections: Sequence[Section]
    data: Sequence[Mapping[str, Any]]
    """A row a run, for the CSV."""
    origins: Sequence[str]
    """Machines and code that the runs come from."""


def write_report(report: Report, out: Path) -> None:
    """``name.md``, ``name.csv``, ``name.html`` and each figure's ``.svg`` and ``.png``, in a folder."""
    figures = {part.figure: _drawn(part.draw, report.name) for part in report.sections if part.draw is not None}
    for name, (svg, png) in figures.items():
        _write(out / f"{name}.svg", svg)
        _write(out / f"{name}.png", png)
    _write(out / f"{report.name}.md", _markdown(report).encode())
    _write(out / f"{report.name}.csv", _csv(report.data).encode())
    _write(out / f"{report.name}.html", _html(report, figures).encode())


def origins(lines: Sequence[Line]) -> list[str]:
    """Each machine and code that a log's results come from."""
    parts = "device", "versions", "code", "date"
    return list(dict.fromkeys("; ".join(line[part] for part in parts) for line in lines))


ONE_GRID = "report one grid by its own command, or move the other runs to another folder."
"""The mend for a log of more."""


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """The mean, and of several half of what lies between the least and the most; a dash where one is missing."""
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return "–"
    mean = f"{fmean(found):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ±{(max(found) - min(found)) / 2:.{digits}f}"


def _drawn(draw: Draw, salt: str) -> tuple[bytes, bytes]:
    """A figure as SVG, the same bytes for the same numbers, and as PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    look: Any = {"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 9,
            "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}  # fmt: skip
    svg, png = io.BytesIO(), io.BytesIO()
    with pyplot.rc_context(look):
        figure = draw(pyplot)
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        pyplot.close(figure)
    return svg.getvalue(), png.getvalue()


def _markdown(report: Report) -> str:
    parts = [f"# {report.title}"]
    for part in report.sections:
        parts += [f"## {part.heading}", *part.words]
        if part.draw is not None:
            parts.append(f"![{part.caption}]({part.figure}.svg)")
        if part.head:
            rows = [part.head, ("---", *("---:" for _ in part.head[1:])), *part.rows]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        if part.caption:
            parts.append(part.caption)
    return "\n\n".join([*parts, *report.origins]) + "\n"


def _html(report: Report, figures: Mapping[str, tuple[bytes, bytes]]) -> str:
    body = f"<h1>{escape(report.title)}</h1>"
    for part in report.sections:
        inside = "".join(f"<p>{escape(words)}</p>" for words in part.words)
        if part.draw is not None:
            image = base64.b64encode(figures[part.figure][1]).decode()
            inside += f'<img alt="{escape(part.caption)}" style="max-width:100%" src="data:image/png;base64,{image}">'
        if part.head:
            cells = [(escape(row[0]), [escape(cell) for cell in row[1:]]) for row in part.rows]
            inside += table([escape(name) for name in part.head], cells)
        body += section(part.heading, inside, *([part.caption] if part.caption else []))
    return page(report.title, body + section("Where the runs come from", "", *report.origins))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
