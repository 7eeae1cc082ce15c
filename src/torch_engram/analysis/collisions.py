"""How the distinct n-grams of a text fall on a memory's rows: what collides, against what a uniform hash would do.

Two n-grams of one order collide in a head when they read the same row of it. With n distinct n-grams on m rows, a
uniform hash leaves an n-gram its row alone with probability (1 - 1/m)^(n-1), and a row empty with (1 - 1/m)^n. As that
holds for every n-gram alike, so much is also expected of the positions of a text, however often an n-gram occurs.
Nothing is trained here and no table is read: tokens and the addressing are enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_engram.addressing import Addressing
from torch_engram.analysis.hit_rates import number_ngrams, text_windows

_PIECE = 2**18  # n-grams whose rows are found at once, those of all columns

_Ints = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class DistinctNgrams:
    """The n distinct n-grams of one order in a text, as the hash sees them: before a document's start lies the pad."""

    order: int
    windows: Tensor
    """int32 ``[n, N]``: canonical ids of one position where each n-gram ends, newest first; the first ``order`` of them
    are the n-gram."""
    counts: _Ints
    """int64 ``[n]``: positions of the text at which each ends."""


@dataclass(frozen=True)
class HeadCollisions:
    """What becomes of a text's n-grams in one head. All but ``rows`` and ``occupied`` are shares, 0 to 1."""

    rows: int
    """m: the head's prime."""
    occupied: int
    """Rows that at least one n-gram reads."""
    expected_occupied: float
    collided: float
    """Of the distinct n-grams: those that share their row with another one."""
    expected_collided: float
    collided_positions: float
    """Of the text's positions: those whose n-gram shares its row with another one. Expected: ``expected_collided``."""
    dominance: float
    """Of the text's positions: those whose n-gram is the most frequent one of its row. It is the mean over positions of
    the share that the most frequent n-gram has of all that its row is read for."""


@dataclass(frozen=True)
class Collisions:
    """The collisions of one order's n-grams in one layer."""

    layer: int
    order: int
    ngrams: int
    """n: distinct n-grams."""
    positions: int
    """Positions of the text, each with one n-gram."""
    heads: tuple[HeadCollisions, ...]
    in_every_head: float
    """Share of the distinct n-grams that collide in every head, not always with the same one."""
    in_every_head_positions: float
    """Share of the positions whose n-gram does."""
    expected_in_every_head: float
    """Either of the two for independent uniform heads: the product of their ``expected_collided``."""


def expected_collided(ngrams: int, rows: int) -> float:
    """Share of ``ngrams`` on ``rows`` that a uniform random hash lets collide: 1 - (1 - 1/m)^(n-1)."""
    return -math.expm1((ngrams - 1) * math.log1p(-1 / rows))


def expected_occupied(ngrams: int, rows: int) -> float:
    """Rows that a uniform random hash occupies with ``ngrams``: m (1 - (1 - 1/m)^n)."""
    return -rows * math.expm1(ngrams * math.log1p(-1 / rows))


def distinct_ngrams(addressing: Addressing, tokens: _Ints, doc_starts: _Ints) -> list[DistinctNgrams]:
    """The distinct n-grams of a text, for each order of a memory.

    ``tokens``: raw ids ``[T]``. ``doc_starts``: the index of each document's first token. Holds some ten integers a
    token. Raises ``ValueError`` for no token, or an id outside the vocabulary.
    """
    if not len(tokens):
        raise ValueError("There is no token to take n-grams of: give a text with at least one.")
    ngrams = number_ngrams(addressing, tokens, doc_starts)
    windows = text_windows(addressing, tokens, doc_starts).int()
    found = []
    for order, ids in zip(ngrams.orders, ngrams.ids, strict=True):
        ids = ids - ids.min()
        counts = np.bincount(ids)
        example = np.empty(len(counts), np.int64)
        example[ids] = np.arange(len(ids))
        found.append(DistinctNgrams(order, windows[torch.from_numpy(example)], counts))
    return found


def table_collisions(addressing: Addressing, ngrams: Iterable[DistinctNgrams]) -> list[Collisions]:
    """The collisions of a text's n-grams in every layer of a memory, each order on its own.

    ``ngrams``: from :func:`distinct_ngrams`, with this memory's or with one that has the same scheme, vocabulary, pad
    and orders. Holds H row ids an n-gram, and two integers a row of one head.
    """
    found = [_collisions(addressing, one, layer) for one in ngrams for layer in addressing.config.layers]
    return sorted(found, key=lambda one: (one.layer, one.order))


def _collisions(addressing: Addressing, ngrams: DistinctNgrams, layer: int) -> Collisions:
    primes = addressing.layouts[layer].primes[ngrams.order - 2]
    heads, in_every_head = [], np.ones(len(ngrams.counts), bool)
    for rows, prime in zip(_rows(addressing, ngrams, layer), primes, strict=True):
        sharing = np.bincount(rows, minlength=prime)
        collided = sharing[rows] > 1
        in_every_head &= collided
        heads.append(_head(rows, ngrams.counts, sharing, collided))
    positions = int(ngrams.counts.sum())
    return Collisions(
        layer,
        ngrams.order,
        len(ngrams.counts),
        positions,
        tuple(heads),
        float(in_every_head.mean()),
        float(ngrams.counts[in_every_head].sum() / positions),
        math.prod(head.expected_collided for head in heads),
    )


def _head(rows: _Ints, counts: _Ints, sharing: _Ints, collided: _Ints) -> HeadCollisions:
    """One head. ``rows``, ``counts``, ``collided``: by n-gram ``[n]``; ``sharing``: n-grams of each row ``[m]``."""
    ngrams, prime, positions = len(rows), len(sharing), counts.sum()
    most = np.zeros(prime, np.int64)
    np.maximum.at(most, rows, counts)
    return HeadCollisions(
        prime,
        int(np.count_nonzero(sharing)),
        expected_occupied(ngrams, prime),
        float(collided.mean()),
        expected_collided(ngrams, prime),
        float(counts[collided].sum() / positions),
        float(most.sum() / positions),
    )


def _rows(addressing: Addressing, ngrams: DistinctNgrams, layer: int) -> _Ints:
    """The row of each n-gram within each head of its order: ``[H, n]``, in integers as short as the primes allow."""
    place, layout = ngrams.order - 2, addressing.layouts[layer]
    heads = addressing.config.per_order("heads")
    columns = slice(sum(heads[:place]), sum(heads[: place + 1]))
    offsets = np.array(layout.offsets[columns])[:, None]
    rows = np.empty((heads[place], len(ngrams.counts)), np.min_scalar_type(max(layout.primes[place])))
    for start in range(0, rows.shape[1], _PIECE):
        piece = slice(start, start + _PIECE)
        found = addressing.rows(ngrams.windows[None, piece].long(), layer)[1][0, :, columns]
        rows[:, piece] = found.T.numpy() - offsets
    return rows
