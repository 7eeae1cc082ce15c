"""Losses over a number that runs vary: points with their seeds, their table, and the curves of several labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch_engram.analysis.page import nats
from torch_engram.studies.grid import Line
from torch_engram.studies.report import ONE_GRID, Draw, Section, spread

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """Runs of one label, by what they vary and by seed."""

    label: str
    points: Mapping[float, Mapping[int, Result]]
    """Results by x and seed; those that went astray are left out."""

    def losses(self, x: float) -> dict[int, float]:
        """Nats a held-out token by seed."""
        return {seed: result["validation"] for seed, result in self.points[x].items()}

    def by_seed(self) -> list[list[float]]:
        """Of every seed that all points have: the losses in the order of x."""
        xs = sorted(self.points)
        seeds = set.intersection(*(set(self.points[x]) for x in xs))
        return [[self.losses(x)[seed] for x in xs] for seed in sorted(seeds)]

    def beyond(self, reference: Curve, x: float) -> list[float]:
        """What its seeds lose beyond the same ones of another curve at x."""
        theirs = reference.losses(x) if x in reference.points else {}
        return [loss - theirs[seed] for seed, loss in self.losses(x).items() if seed in theirs]


def curves(lines: Sequence[Line], x: Callable[[Line], float]) -> list[Curve]:
    """Of each label, in the log's order. Raises ``ValueError`` for two runs of one seed at one point."""
    found: dict[str, dict[float, dict[int, Result]]] = {}
    for line in lines:
        if line["result"]["validation"] is not None:
            point = found.setdefault(line["run"]["label"], {}).setdefault(x(line), {})
            seed = line["run"]["recipe"]["seed"]
            if seed in point:
                raise ValueError(
                    f"Two runs of {line['run']['label']!r} with seed {seed} stand at one point: {ONE_GRID}"
                )
            point[seed] = line["result"]
    return [Curve(label, points) for label, points in found.items()]


def curve_section(
    heading: str,
    found: Sequence[Curve],
    x_label: str,
    words: tuple[str, ...] = (),
    *,
    reference: Curve | None = None,
    log: bool = False,
) -> Section:
    """Their table and their figure, named as the heading is; against a ``reference``, seed by seed at the same x."""
    name = heading.lower().replace(" ", "-")
    against = [f"to {reference.label}"] if reference is not None else []
    rows = [_row(curve, x, reference) for curve in found for x in sorted(curve.points)]
    return Section(
        heading, words, head=("", x_label, "runs", *_SCORES, *against), rows=rows,
        figure=name, draw=draw_curves(found, x_label, log) if found else None, caption=CAPTION,
    )  # fmt: skip


def _row(curve: Curve, x: float, reference: Curve | None) -> tuple[str, ...]:
    results = curve.points[x].values()
    cells = (curve.label, f"{x:.3g}", str(len(results)))
    scores = (spread([one[score] for one in results]) for score in _SCORES)
    if reference is None:
        return *cells, *scores
    beyond = curve.beyond(reference, x) if curve is not reference else []
    return *cells, *scores, nats(fmean(beyond), signed=True) if beyond else "–"


_SCORES = "validation", "novel", "seen", "train"
CAPTION = (
    "Nats a token of held-out text, of its tokens that end no 13-gram of the trained text (novel) and that do (seen), "
    "and of the last steps' own batches. Of several seeds the mean, and half of what lies between the least and the "
    "most; bars are these ends. What is beyond another curve is taken from the same seeds."
)


def draw_curves(found: Sequence[Curve], x_label: str, log: bool = False) -> Draw:
    """A line a label, with bars from the least to the most of its seeds."""

    def draw(pyplot: Any) -> Any:
        figure, axis = pyplot.subplots(figsize=(5.6, 3.6), layout="constrained")
        for curve in found:
            xs = sorted(curve.points)
            losses = [list(curve.losses(x).values()) for x in xs]
            middle = [fmean(each) for each in losses]
            ends = [[abs(edge(each) - m) for m, each in zip(middle, losses, strict=True)] for edge in (min, max)]
            axis.errorbar(xs, middle, ends, marker="o", markersize=3, capsize=2, label=curve.label)
        axis.set(xlabel=x_label, ylabel="nats a token", xscale="log" if log else "linear")
        axis.legend()
        return figure

    return draw
