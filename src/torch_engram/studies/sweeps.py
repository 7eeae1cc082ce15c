"""Settings changed around a base: which runs differ in what, their table and their figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch_engram.analysis.page import nats
from torch_engram.studies.grid import Line
from torch_engram.studies.report import ONE_GRID, Draw, Section, spread
from torch_engram.studies.training import settings_of
from torch_engram.train import Recipe

PEAK = 989.4e12
"""Operations a second in bf16 of an H100 or H200."""
HEAD = ("setting", "runs", "validation", "to base", "novel", "seen", "train", "k tokens/s", "MFU", "peak load")
"""Columns of :func:`cells`: nats a token; tokens of the busiest expert over the mean."""
CAPTION = (
    "Nats a token of held-out text as one setting changes, the others as in the base, and what that is beyond the base "
    "of the same seeds. Of several seeds the mean, and half of what lies between the least and the most. Runs that "
    "share a device slow each other down."
)
_SHORT = {"model.engrams.engram.": "", "model.moe.": "", "table.": "table ", "rates.": "rate of "}


@dataclass(frozen=True)
class Variant:
    """Runs that differ from a base in the same way, and from each other in their seed."""

    settings: Mapping[str, Any]
    """All of them, by dotted name."""
    changed: Sequence[str]
    """Names of those that differ; none of the base itself."""
    results: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join(f"{_short(name)} {_said(self.settings[name])}" for name in self.changed) or "base"

    @property
    def losses(self) -> dict[int, float]:
        """Nats a held-out token by seed, of those that did not go astray."""
        scores = {result["seed"]: result["validation"] for result in self.results}
        return {seed: score for seed, score in scores.items() if score is not None}

    def beyond(self, base: Variant) -> list[float]:
        """What its seeds lose beyond the same ones of a base."""
        return [loss - base.losses[seed] for seed, loss in self.losses.items() if seed in base.losses]


def variants(lines: Sequence[Line]) -> list[Variant]:
    """Lines of one model, seeds together, the base first, if any run of it has ended. Raises ``ValueError`` for two
    runs of one seed that differ in what no table tells."""
    found: dict[tuple[str, ...], dict[int, Line]] = {}
    for line in sorted(lines, key=lambda line: bool(line["run"]["changed"])):
        same = found.setdefault(tuple(line["run"]["changed"]), {})
        seed = line["run"]["recipe"]["seed"]
        if seed in same:
            raise ValueError(f"Two runs of {line['run']['label']!r} have seed {seed} and the same settings: {ONE_GRID}")
        same[seed] = line
    return [_variant(changed, same) for changed, same in found.items()]


def _variant(changed: Sequence[str], same: Mapping[int, Line]) -> Variant:
    settings = settings_of(Recipe.from_dict(next(iter(same.values()))["run"]["recipe"]))
    results = [{**line["result"], "device": line["device"], "seed": seed} for seed, line in same.items()]
    return Variant(settings, [setting.partition("=")[0] for setting in changed], results)


def sweep_section(lines: Sequence[Line]) -> Section:
    """The table and the figure of one model's lines. Raises ``ValueError`` as :func:`variants` does."""
    label, found = lines[0]["run"]["label"], variants(lines)
    if found[0].changed or not found[0].losses:
        return Section(label, ("No run of the base has ended well yet, and what is changed is compared with it.",))
    return Section(
        label, head=HEAD, rows=[cells(one, found[0]) for one in found],
        figure="sweep-" + re.sub(r"\W+", "-", label.lower()), draw=draw_sweeps(found), caption=CAPTION,
    )  # fmt: skip


def cells(one: Variant, base: Variant) -> tuple[str, ...]:
    """A line of the table."""
    names = "validation", "novel", "seen", "train", "tokens_per_second", "expert_peak_load"
    of = {name: [result[name] for result in one.results] for name in names}
    astray, loads, beyond = len(one.losses) < len(one.results), of["expert_peak_load"], one.beyond(base)
    shares = [share for result in one.results if (share := utilisation(result)) is not None]
    return (
        one.name, str(len(one.results)), "astray" if astray else spread(of["validation"]),
        "–" if one is base or not beyond else nats(fmean(beyond), signed=True),
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
    """The loss over each number that was changed alone, with the base of the same seeds; the band is all of its."""
    base = found[0]
    panels: dict[str, list[Variant]] = {}
    for one in found[1:]:
        if len(one.changed) == 1 and one.losses:
            (name,) = one.changed
            if all(isinstance(each.settings[name], int | float) for each in (base, one)):
                panels.setdefault(name, [base]).append(one)

    def draw(pyplot: Any) -> Any:
        columns = min(4, max(1, len(panels)))
        rows = -(-max(1, len(panels)) // columns)
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(2.6 * columns, 2.3 * rows), sharey=True, squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, (name, points) in zip(axes.flat, panels.items(), strict=False):
            axis.axhspan(min(base.losses.values()), max(base.losses.values()), color="0.9")
            _draw_setting(axis, name, points)
        for row in axes:
            row[0].set_ylabel("nats a token")
        return figure

    return draw


def _draw_setting(axis: Any, name: str, points: Sequence[Variant]) -> None:
    """Over the values of one setting; the base of the seeds that its variants have."""
    base, *others = points
    seeds = {seed for one in others for seed in one.losses} & set(base.losses) or set(base.losses)
    points = sorted(points, key=lambda one: float(one.settings[name]))
    values = [one.settings[name] for one in points]
    losses = [[loss for seed, loss in one.losses.items() if one is not base or seed in seeds] for one in points]
    middle = [fmean(each) for each in losses]
    low, high = ([abs(edge(each) - m) for m, each in zip(middle, losses, strict=True)] for edge in (min, max))
    axis.errorbar(values, middle, [low, high], marker="o", markersize=3, capsize=2)
    axis.set(title=_short(name), xscale="log" if values[0] > 0 else "linear")
    axis.set_xticks(values, [_said(value) for value in values], minor=False)
    axis.minorticks_off()


def row_of(line: Line) -> dict[str, Any]:
    """A run for the CSV: its settings that may differ, and its scores."""
    recipe, result = Recipe.from_dict(line["run"]["recipe"]), {**line["result"], "device": line["device"]}
    scores = {name: value for name, value in result.items() if name not in ("curve", "sizes", "device")}
    settings = {name: _said(value) for name, value in settings_of(recipe).items()}
    counted: dict[str, Any] = {**result["sizes"], "utilisation": utilisation(result)}
    if line["run"]["way"]:  # whose size and work the accounting of Engrams does not know
        counted = {**dict.fromkeys(counted), "tables": counted["tables"]}
        scores["flops"] = None
    return {"label": line["run"]["label"], **scores, **counted,
            **settings, "device": line["device"], "code": line["code"], "date": line["date"]}  # fmt: skip


def _short(name: str) -> str:
    for long, short in _SHORT.items():
        if name.startswith(long):
            return (short + name.removeprefix(long)).replace("_", " ")
    return name.replace("_", " ")


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
