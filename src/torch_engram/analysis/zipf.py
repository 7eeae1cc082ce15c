"""The laws of a text's n-grams: how often each occurs (Zipf), and how many there are in so many tokens (Heaps).

Zipf's law says that the r-th most frequent n-gram occurs in proportion to r^-s. Then the number of n-grams that occur x
times falls as x^-α with α = 1 + 1/s. That is what is fitted, by maximum likelihood for a discrete power law over counts
from a minimum on: a line through logarithms of counts would be biased (Clauset, Shalizi and Newman, 2009, arXiv
0706.1062, section 3.1 and appendix B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_TERMS = 1000  # of an infinite sum, before its tail is an integral
_HALVINGS = 80  # of the interval in which the exponent lies

_Ints = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PowerLaw:
    """The law P(x) = x^-α / ζ(α, minimum) of the counts x ≥ minimum, as fitted."""

    exponent: float
    """α > 1."""
    error: float
    """Standard error of α."""
    minimum: int
    ngrams: int
    """Distinct n-grams that occur so often: those that were fitted."""

    @property
    def rank_exponent(self) -> float:
        """The s of Zipf's law by rank: 1 / (α - 1)."""
        return 1 / (self.exponent - 1)

    @property
    def rank_error(self) -> float:
        """Standard error of s, to first order in that of α."""
        return self.error / (self.exponent - 1) ** 2


def fit_power_law(counts: _Ints, minimum: int) -> PowerLaw:
    """Fit the law of the counts of a text's distinct n-grams by maximum likelihood.

    ``counts``: int ``[n]``, one an n-gram, in any order. ``minimum``: the least count that is fitted, 1 or more; rare
    n-grams seldom follow the law. The likeliest α solves -ζ'(α, minimum) / ζ(α, minimum) = mean ln x, both sides of
    which are means of ln X, and its error is 1 / sqrt(n Var ln X). Raises ``ValueError`` for another minimum, and where
    no n-gram occurs more than ``minimum`` times.
    """
    if minimum < 1:
        raise ValueError(f"minimum is {minimum}: counts are fitted from 1 or more on.")
    logs = np.log(counts[counts >= minimum] / minimum)
    if not logs.any():
        raise ValueError(f"No n-gram occurs more than {minimum} times: give more text, or a lower minimum.")
    exponent = _likeliest(float(logs.mean()), minimum)
    mean, square = _log_moments(exponent, minimum)
    return PowerLaw(exponent, 1 / math.sqrt(len(logs) * (square - mean**2)), minimum, len(logs))


def _likeliest(mean_log: float, minimum: int) -> float:
    """The α for which ln(X / minimum) has this mean, which falls as α grows."""
    low = high = 1 / mean_log  # of α - 1: what it is for a continuous power law
    while _log_moments(1 + low, minimum)[0] < mean_log:
        low /= 2
    while _log_moments(1 + high, minimum)[0] > mean_log:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _log_moments(1 + middle, minimum)[0] > mean_log:
            low = middle
        else:
            high = middle
    return 1 + (low + high) / 2


def _log_moments(exponent: float, minimum: int) -> tuple[float, float]:
    """The means of ln(X / minimum) and of its square under the law."""
    total = power_sum(exponent, minimum, 0)
    return power_sum(exponent, minimum, 1) / total, power_sum(exponent, minimum, 2) / total


def power_sum(exponent: float, minimum: int, power: int) -> float:
    """Σ (x/m)^-α ln(x/m)^k over the integers x from m on: m^α ζ(α, m) for k = 0, with ln's powers its derivatives in α.

    ``exponent``: α > 1; ``minimum``: m; ``power``: k. The first terms are summed, and from b on the tail by
    Euler and Maclaurin, ∫ f + f(b)/2 - f'(b)/12, which leaves out f'''(b)/720.
    """
    ratios = np.arange(minimum, minimum + _TERMS) / minimum
    head = (ratios**-exponent * np.log(ratios) ** power).sum()
    border = minimum + _TERMS
    log, weight = math.log(border / minimum), (border / minimum) ** -exponent
    integral = border * sum(
        math.perm(power, j) * log ** (power - j) / (exponent - 1) ** (j + 1) for j in range(power + 1)
    )
    slope = ((power * log ** (power - 1) if power else 0.0) - exponent * log**power) / border
    return float(head + weight * (integral + log**power / 2 - slope / 12))


@dataclass(frozen=True)
class HeapsLaw:
    """The law V(N) = K N^β of the distinct n-grams in the first N tokens of a text, as fitted."""

    scale: float
    """K."""
    exponent: float
    """β: 1 where every n-gram is new, 0 where none is."""
    tokens: tuple[int, ...]
    """N: lengths of the prefixes."""
    distinct: tuple[int, ...]
    """V: the distinct n-grams of each, which were fitted."""


def fit_heaps(ids: _Ints, *, shortest: int = 1024) -> HeapsLaw:
    """Fit the growth of a text's n-grams by least squares of ln V on ln N, over prefixes at powers of two.

    ``ids``: int ``[T]``, the n-gram that ends at each token, as :func:`~torch_engram.analysis.number_ngrams` numbers
    those of one order. ``shortest``: tokens of the shortest prefix, at least; in the first tokens of a text nearly
    every n-gram is new, whatever the law. Raises ``ValueError`` for a text with fewer than two such prefixes.
    """
    lengths = [2**power for power in range(len(ids).bit_length()) if shortest <= 2**power <= len(ids)]
    if len(lengths) < 2:
        raise ValueError(
            f"A text of {len(ids):,} tokens has fewer than two prefixes of {shortest:,} tokens or more that are powers "
            "of two: give more text, or a smaller shortest."
        )
    first = np.sort(np.unique(ids, return_index=True)[1])
    distinct = np.searchsorted(first, lengths)  # n-grams that occur before each length
    exponent, intercept = np.polyfit(np.log(lengths), np.log(distinct), 1)
    return HeapsLaw(math.exp(intercept), float(exponent), tuple(lengths), tuple(distinct.tolist()))
