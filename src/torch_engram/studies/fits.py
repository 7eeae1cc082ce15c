"""Fits with intervals of confidence, of 95 %: means, lines, power laws, the lowest point of a parabola."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number, and the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Line:
    """``y = intercept + slope * x`` by least squares."""

    intercept: float
    slope: Estimate
    r_squared: float


@dataclass(frozen=True)
class Power:
    """``y = floor + factor * x ** -exponent`` by least squares."""

    floor: float
    exponent: Estimate
    r_squared: float


def mean(values: Sequence[float]) -> Estimate:
    """Of a normal distribution, by Student's t; of paired differences, say. Needs two values."""
    from scipy import stats

    found = np.asarray(values, np.float64)
    half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found)
    return Estimate(float(found.mean()), float(found.mean() - half), float(found.mean() + half))


def sigmas(values: Sequence[float]) -> float:
    """The mean over its standard error."""
    found = np.asarray(values, np.float64)
    return float(found.mean() / (found.std(ddof=1) / len(found) ** 0.5))


def straight(x: ArrayLike, y: ArrayLike) -> Line:
    """A straight line through three points or more; the slope's interval by Student's t."""
    from scipy import stats

    x_, y_ = np.asarray(x, np.float64), np.asarray(y, np.float64)
    found = stats.linregress(x_, y_)
    half = stats.t.ppf(0.975, len(x_) - 2) * found.stderr
    slope = Estimate(float(found.slope), float(found.slope - half), float(found.slope + half))
    return Line(float(found.intercept), slope, float(found.rvalue**2))


def power(x: ArrayLike, y: ArrayLike) -> Power | None:
    """A power law of positive ``x`` through five points or more, which falls to a floor; intervals by the fit's
    covariance, which is that of a straight line near the optimum. None where the points show no such law: where it does
    not fall, or where an exponent of 0, a straight line over the logarithm of ``x``, would do as well."""
    from scipy import optimize, stats

    x_, y_ = np.asarray(x, np.float64), np.asarray(y, np.float64)
    scale = float(np.exp(np.log(x_).mean()))  # around 1, where factor and exponent say different things

    def law(at: Numbers, floor: float, factor: float, exponent: float) -> Numbers:
        found: Numbers = floor + factor * (at / scale) ** -exponent
        return found

    start = y_.min() - np.ptp(y_), np.ptp(y_), 0.2
    try:
        (floor, factor, exponent), covariance = optimize.curve_fit(law, x_, y_, start, maxfev=20_000)
    except RuntimeError:
        return None
    half = float(stats.t.ppf(0.975, len(x_) - 3) * covariance[2, 2] ** 0.5)
    if factor <= 0 or not half < exponent:
        return None
    left = ((y_ - law(x_, floor, factor, exponent)) ** 2).sum() / ((y_ - y_.mean()) ** 2).sum()
    return Power(
        float(floor), Estimate(float(exponent), float(exponent) - half, float(exponent) + half), float(1 - left)
    )


def lowest(x: ArrayLike, y: ArrayLike) -> Estimate:
    """Where a parabola through ``y [seeds, points]`` is lowest within the points ``x``: the mean of every seed's own
    lowest point, by Student's t."""
    x_ = np.asarray(x, np.float64)
    return mean([_lowest(x_, each) for each in np.asarray(y, np.float64)])


def _lowest(x: Numbers, y: Numbers) -> float:
    a, b, _ = np.polyfit(x, y, 2)
    ends = [float(x.min()), float(x.max())]
    inner = [-b / (2 * a)] if a > 0 and ends[0] < -b / (2 * a) < ends[1] else []
    return float(min([*inner, *ends], key=lambda at: a * at * at + b * at))
