"""Settings changed around a base: which runs differ in what, their table and their figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch_engram.analysis.page import nats
from torch_engram.studies.grid import Line
from torch_engram.studies.report import Draw, spread
from torch_engram.studies.training import apart, settings_of
from torch_engram.train import Recipe

PEAK = 989.4e12
"""Operations a second in bf16 of an H100 or H200."""
HEAD = ("setting", "runs", "validation", "to base", "novel", "seen", "train", "k tokens/s", "MFU", "peak load")
"""Columns of :func:`cells`: nats a token; tokens of the busiest expert over the mean."""
_SHORT = {"model.engrams.engram.": "", "model.moe.": "", "table.": "table ", "rates.": "rate of "}


@dataclass(frozen=True)
class Variant:
    """Runs that differ from a base in the same way, and from each other in their seed."""

    settings: Mapping[str, Any]
    """All of them, by dotted name."""
    changed: Mapping[str, Any]
    """Those that differ; none of the base itself."""
    results: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join(f"{_short(name)} {_said(value)}" for name, value in self.changed.items()) or "base"

    @property
    def validation(self) -> list[float]:
        """Nats a token of those that did not go astray."""
        return [result["validation"] for result in self.results if result["validation"] is not None]


def variants(lines: Sequence[Line]) -> list[Variant]:
    """Lines of one model, the first a base's, seeds together; the base comes first."""
    base = settings_of(Recipe.from_dict(lines[0]["run"]["recipe"]))
    found: dict[str, tuple[dict[str, Any], list[Any]]] = {}
    for line in lines:
        changed = apart(base, settings_of(Recipe.from_dict(line["run"]["recipe"])))
        found.setdefault(repr(changed), (changed, []))[1].append({**line["result"], "device": line["device"]})
    return [Variant(base | changed, changed, results) for changed, results in found.values()]


def cells(one: Variant, base: Variant) -> tuple[str, ...]:
    """A line of the table."""
    of = {name: [result[name] for result in one.results] for name in one.results[0]}
    astray, loads = len(one.validation) < len(one.results), of["expert_peak_load"]
    shares = [share for result in one.results if (share := utilisation(result)) is not None]
    return (
        one.name, str(len(one.results)), "astray" if astray else spread(of["validation"]),
        "–" if astray or one is base else nats(fmean(one.validation) - fmean(base.validation), signed=True),
        spread(of["novel"]), spread(of["seen"]), spread(of["train"]),
        f"{fmean(of['tokens_per_second']) / 1e3:.0f}",
        f"{100 * fmean(shares):.1f} %" if shares else "–",
        "–" if None in loads else f"{max(loads):.1f}",
    )  # fmt: skip


def utilisation(result: Mapping[str, Any]) -> float | None:
    """Model FLOPs a second over :data:`PEAK`; None on other devices."""
    known = any(name in result["device"] for name in ("H100", "H200"))
    return result["flops"] * result["tokens_per_second"] / PEAK if known else None


def draw_sweeps(found: Sequence[Variant]) -> Draw:
    """The loss over each number that was changed alone; the line across is the base's, as wide as its seeds."""
    base = found[0]
    panels: dict[str, list[Variant]] = {}
    for one in found[1:]:
        if len(one.changed) == 1 and one.validation:
            (name, value), *_ = one.changed.items()
            if isinstance(value, int | float) and isinstance(base.settings[name], int | float):
                panels.setdefault(name, []).append(one)

    def draw(pyplot: Any) -> Any:
        columns = min(4, max(1, len(panels)))
        rows = -(-max(1, len(panels)) // columns)
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(2.6 * columns, 2.3 * rows), sharey=True, squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, (name, others) in zip(axes.flat, panels.items(), strict=False):
            points = sorted((one.settings[name], one.validation) for one in (base, *others))
            middle = [fmean(losses) for _, losses in points]
            ends = [[m - min(p) for m, (_, p) in zip(middle, points, strict=True)],
                    [max(p) - m for m, (_, p) in zip(middle, points, strict=True)]]  # fmt: skip
            axis.axhspan(min(base.validation), max(base.validation), color="0.9")
            axis.errorbar([value for value, _ in points], middle, ends, marker="o", markersize=3, capsize=2)
            axis.set(title=_short(name), xscale="log" if min(points)[0] > 0 else "linear")
        for row in axes:
            row[0].set_ylabel("nats a token")
        return figure

    return draw


def row_of(line: Line) -> dict[str, Any]:
    """A run for the CSV: its settings that may differ, and its scores."""
    recipe, result = Recipe.from_dict(line["run"]["recipe"]), {**line["result"], "device": line["device"]}
    scores = {name: value for name, value in result.items() if name not in ("curve", "sizes", "device")}
    settings = {name: _said(value) for name, value in settings_of(recipe).items()}
    return {"label": line["run"]["label"], **scores, **result["sizes"], "utilisation": utilisation(result),
            **settings, "device": line["device"], "code": line["code"], "date": line["date"]}  # fmt: skip


def _short(name: str) -> str:
    for long, short in _SHORT.items():
        if name.startswith(long):
            return (short + name.removeprefix(long)).replace("_", " ")
    return name.replace("_", " ")


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
