"""Fits find what points were made of, and their intervals hold it as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy")

from torch_engram.studies.fits import lowest, mean, power, sigmas, straight

DRAW = np.random.default_rng(0)


def test_a_line_is_found_again() -> None:
    x = np.log10([1e5, 3e5, 1e6, 3e6, 1e7])
    found = straight(x, 3.0 - 0.028 * x)
    assert found.slope.value == pytest.approx(-0.028) and found.intercept == pytest.approx(3.0)
    assert found.r_squared == pytest.approx(1) and found.slope.high - found.slope.low < 1e-6


def test_intervals_hold_the_truth_in_some_95_of_100() -> None:
    x, held, slopes = np.arange(6.0), 0, 0
    for _ in range(1000):
        sample = mean(DRAW.normal(0.03, 0.02, 5).tolist())
        held += sample.low < 0.03 < sample.high
        slope = straight(x, -0.5 * x + DRAW.normal(0, 1, 6)).slope
        slopes += slope.low < -0.5 < slope.high
    assert 925 < held < 975 and 925 < slopes < 975


def test_a_power_law_is_found_again_and_where_there_is_none_the_fit_says_so() -> None:
    x = np.array([1.4e4, 4.4e4, 1.4e5, 4.4e5, 1.4e6, 4.4e6])
    found = power(x, 2.1 + 3.0 * x**-0.3)
    assert found is not None
    assert found.floor == pytest.approx(2.1, abs=1e-4) and found.exponent.value == pytest.approx(0.3, abs=1e-3)
    assert found.r_squared == pytest.approx(1) and found.exponent.high - found.exponent.low < 1e-2
    held = 0
    for _ in range(200):
        noisy = power(x, 2.1 + 3.0 * x**-0.3 + DRAW.normal(0, 1e-3, 6))
        held += noisy is not None and noisy.exponent.low < 0.3 < noisy.exponent.high
    assert held > 180
    assert power(x, 2.6 - 0.028 * np.log10(x)) is None  # a straight line would do
    assert power(x, 2.0 + 0.1 * np.log10(x)) is None  # nothing falls
    assert sum(power(x, 2.0 + DRAW.normal(0, 1e-3, 6)) is not None for _ in range(50)) <= 5


def test_sigmas_are_standard_errors_of_the_mean() -> None:
    assert sigmas([1.0, 2.0, 3.0]) == pytest.approx(2 / (1 / 3**0.5))


def test_the_lowest_point_of_a_parabola_and_of_what_is_none() -> None:
    x = np.linspace(0.2, 1, 7)
    seeds = (x - 0.77) ** 2 + DRAW.normal(0, 1e-3, (3, 1))  # what seeds share moves no minimum
    found = lowest(x, seeds)
    assert found.value == pytest.approx(0.77) and found.low == pytest.approx(0.77) == found.high
    assert lowest(x, np.tile(-x, (3, 1))).value == 1 and lowest(x, np.tile(-((x - 0.5) ** 2), (3, 1))).value == 1


def test_the_lowest_point_is_as_uncertain_as_seeds_differ() -> None:
    x, held = np.linspace(0.2, 1, 7), 0
    for _ in range(300):
        found = lowest(x, [0.1 * (x - 0.65) ** 2 + DRAW.normal(0, 1e-3, 7) for _ in range(3)])
        held += found.low < 0.65 < found.high
    assert held > 270
