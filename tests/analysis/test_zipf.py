"""Laws fitted to draws from them, and the sums behind the fit against zeta functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.analysis import fit_heaps, fit_power_law
from torch_engram.analysis.zipf import power_sum


def zeta(exponent: float, minimum: int) -> float:
    """m^α ζ(α, m), with Hurwitz' zeta function as PyTorch has it."""
    exponents, minima = torch.tensor([[exponent], [minimum]], dtype=torch.float64)
    return float(torch.special.zeta(exponents, minima)) * minimum**exponent


@given(exponent=st.floats(1.001, 6), minimum=st.integers(1, 2000))
def test_power_sums_are_zeta_and_its_derivatives(exponent, minimum):
    assert power_sum(exponent, minimum, 0) == pytest.approx(zeta(exponent, minimum), rel=1e-11)
    step = 1e-4 * (exponent - 1)
    for power in (0, 1):
        after, before = (power_sum(exponent + sign * step, minimum, power) for sign in (1, -1))
        assert power_sum(exponent, minimum, power + 1) == pytest.approx((before - after) / (2 * step), rel=1e-5)


def test_power_sums_have_known_values():
    assert power_sum(2, 1, 0) == pytest.approx(math.pi**2 / 6, rel=1e-13)
    assert power_sum(4, 1, 0) == pytest.approx(math.pi**4 / 90, rel=1e-13)
    assert power_sum(2, 1, 1) == pytest.approx(0.937548254315844, rel=1e-13)  # -ζ'(2)
    assert power_sum(2, 1, 2) == pytest.approx(1.98928023429890, rel=1e-13)  # ζ''(2)


@pytest.mark.parametrize(("exponent", "minimum"), [(1.5, 1), (1.9, 1), (2.5, 1), (2.0, 5), (3.0, 3)])
def test_the_exponent_that_counts_were_drawn_with_and_how_far_fits_are_from_it(exponent, minimum):
    """What lies above a minimum of a power law from 1 on is one from there on."""
    generator = np.random.default_rng(0)
    fits = [fit_power_law(generator.zipf(exponent, 4000), minimum) for _ in range(200)]
    scores = np.array([(fit.exponent - exponent) / fit.error for fit in fits])
    assert abs(scores.mean()) < 0.3 and 0.85 < scores.std() < 1.15
    assert all(fit.minimum == minimum and (fit.ngrams == 4000) == (minimum == 1) for fit in fits)


@given(counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=30), minimum=st.integers(1, 20))
def test_no_other_exponent_is_likelier(counts, minimum):
    counts = np.array(counts)
    kept = counts[counts >= minimum]
    if not (kept > minimum).any():
        with pytest.raises(ValueError, match=f"No n-gram occurs more than {minimum} times: give more text"):
            fit_power_law(counts, minimum)
        return
    fit = fit_power_law(counts, minimum)

    def nats(exponent: float) -> float:
        """Of all counts under P(x) = x^-α / ζ(α, m)."""
        return float((exponent * np.log(kept / minimum) + math.log(power_sum(exponent, minimum, 0))).sum())

    assert fit.ngrams == len(kept)
    for away in (-0.01, 0.01):
        assert nats(fit.exponent) < nats(1 + (fit.exponent - 1) * (1 + away))
    step = 1e-3 * (fit.exponent - 1)
    curvature = (nats(fit.exponent + step) + nats(fit.exponent - step) - 2 * nats(fit.exponent)) / step**2
    assert fit.error == pytest.approx(curvature**-0.5, rel=1e-2)


@pytest.mark.parametrize("rank_exponent", [0.7, 1.0, 1.4])
def test_the_exponent_by_rank(rank_exponent):
    """Counts that fall as r^-s, rounded: from 20 on the rounding says little."""
    ranks = np.arange(1, 200_001)
    counts = np.floor(20 * 200_000**rank_exponent * ranks**-rank_exponent).astype(np.int64)
    fit = fit_power_law(counts, 20)
    assert fit.rank_exponent == pytest.approx(rank_exponent, rel=0.03)
    steeper = 1 / (fit.exponent - 1e-6 - 1)
    assert fit.rank_error == pytest.approx((steeper - fit.rank_exponent) / 1e-6 * fit.error, rel=1e-3)


def test_a_minimum_below_one_is_refused():
    with pytest.raises(ValueError, match="minimum is 0: counts are fitted from 1"):
        fit_power_law(np.array([1, 2, 3]), 0)


@pytest.mark.parametrize(("scale", "exponent"), [(1.0, 1.0), (3.0, 0.8), (20.0, 0.55)])
def test_the_growth_that_a_text_was_drawn_with(scale, exponent):
    """Each n-gram is new with the probability by which the law grows there, and else an earlier one."""
    generator, tokens = np.random.default_rng(0), np.arange(1, 2**19 + 1)
    growth = scale * (tokens**exponent - (tokens - 1) ** exponent)
    new = generator.random(len(tokens)) < growth
    new[0] = True
    ids = np.where(new, new.cumsum() - 1, (generator.random(len(tokens)) * new.cumsum()).astype(np.int64))
    fit = fit_heaps(ids)
    assert fit.exponent == pytest.approx(exponent, abs=0.03)
    assert fit.scale == pytest.approx(scale, rel=0.3)
    assert fit.tokens == tuple(2**power for power in range(10, 20))


@given(ids=st.lists(st.integers(-5, 30), min_size=2, max_size=200), shortest=st.sampled_from([1, 2, 3, 16]))
def test_growth_against_sets_and_the_normal_equations(ids, shortest):
    lengths = [length for length in (1, 2, 4, 8, 16, 32, 64, 128) if shortest <= length <= len(ids)]
    if len(lengths) < 2:
        with pytest.raises(ValueError, match="give more text, or a smaller shortest"):
            fit_heaps(np.array(ids), shortest=shortest)
        return
    fit = fit_heaps(np.array(ids), shortest=shortest)
    assert fit.tokens == tuple(lengths)
    assert fit.distinct == tuple(len(set(ids[:length])) for length in lengths)
    x, y = np.log(lengths), np.log(fit.distinct)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert fit.exponent == pytest.approx(slope, abs=1e-9)
    assert math.log(fit.scale) == pytest.approx(y.mean() - slope * x.mean(), abs=1e-9)
