"""docs/figures/table-training.svg: step time and memory of every way to train a table, drawn from the CSV."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

from record import RESULTS

from torch_engram.analysis.charts import Series, bar_groups, number

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "figures" / "table-training.svg"
NAMES = {
    "network": "the network alone",
    "ours-rowwise": "ours, RowwiseAdam, HBM",
    "ours-adam": "ours, RowAdam, HBM",
    "ours-adam-host": "ours, RowAdam, host memory",
    "dense-adam": "nn.Embedding, Adam (fused)",
    "sparse-adam": "nn.Embedding(sparse=True), SparseAdam",
    "peft-sparse": "engram-peft 1.2.7, sparse",
    "peft-dense": "engram-peft 1.2.7, dense",
}
COLORS = (1, 2, 3, 4, 5)
CHARTS = {"step": ("Step time, ms", "ms"), "peak": ("GPU memory at most, GiB", "GiB")}


def draw(results: Path = RESULTS / "table-training.csv", figure: Path = FIGURE) -> None:
    """A chart of the time and one of the memory, a group of bars a way and a bar a number of rows."""
    with open(results, newline="") as file:
        rows = {row["case"]: float(row["value"]) for row in csv.DictReader(file)}
    sizes = [case.removeprefix("distinct-") for case in rows if case.startswith("distinct-")]
    ways = [way for way in NAMES if any(f"{way}-{size}-step" in rows for size in sizes)]
    charts = [chart(rows, ways, sizes, what, *titles) for what, titles in CHARTS.items()]
    figure.write_text(sheet(charts, sizes), encoding="utf-8")


def chart(rows: dict[str, float], ways: list[str], sizes: list[str], what: str, title: str, unit: str) -> str:
    """One chart; a way's name says at which sizes it ran out of memory."""
    series = [
        Series(f"{size} rows", COLORS[color % len(COLORS)], [
            (float(place), rows.get(f"{way}-{size}-{what}", math.nan)) for place, way in enumerate(ways)
        ])
        for color, size in enumerate(sizes)
    ]  # fmt: skip
    named = []
    for way in ways:
        absent = [size for size in sizes if rows.get(f"{way}-{size}-{what}") == math.inf]
        named.append(NAMES[way] + (f" ({', '.join(absent)}: out of memory)" if absent else ""))
    return bar_groups(series, named, title=title, show=lambda value: f"{number(value)} {unit}", one_scale=True)


def sheet(charts: list[str], sizes: list[str]) -> str:
    """The charts side by side with their titles and one legend, in the library's colours."""
    style = (ROOT / "src" / "torch_engram" / "analysis" / "report.css").read_text(encoding="utf-8")
    parts, height = [], 0
    for place, chart in enumerate(charts):
        title, inner = re.findall(r"<figcaption>(.*?)</figcaption>", chart)[0], re.findall(r"(<svg.*</svg>)", chart)[0]
        high = int(re.findall(r'viewBox="0 0 \d+ (\d+)"', inner)[0])
        x, height = 20 + 490 * place, max(height, high)
        parts.append(f'<text class="title" x="{x}" y="50">{title}</text>')
        parts.append(inner.replace('<svg class="chart" ', f'<svg x="{x}" y="64" width="460" height="{high}" ', 1))
    for place, size in enumerate(sizes):
        x = 28 + 120 * place
        parts.append(f'<circle class="series-{COLORS[place % len(COLORS)]}" cx="{x}" cy="16" r="5"/>')
        parts.append(f'<text x="{x + 10}" y="20">{size} rows</text>')
    style += ".chart .title { font-weight: 600; fill: var(--text); }\n.chart { background: var(--ground); }\n"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 990 {height + 84}" class="chart" role="img"'
    label = "Step time and memory over rows, for ways to train a table"
    return f'{head} aria-label="{label}"><style><![CDATA[\n{style}]]></style>\n{chr(10).join(parts)}\n</svg>\n'
