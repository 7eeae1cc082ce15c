"""Collisions against dictionaries of who reads which row, and against random hashes."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.addressing import Addressing
from torch_engram.analysis import collisions as collisions_module
from torch_engram.analysis import distinct_ngrams, table_collisions
from torch_engram.analysis.collisions import expected_collided, expected_occupied
from torch_engram.config import EngramConfig

CONFIG = EngramConfig(layers=(1, 4), hidden=8, vocab_size=5, max_ngram=4, rows_per_head=9, heads=2, pad_id=2)


def windows_and_rows(addressing, tokens, starts, layer):
    """The window and the row of every column, offsets added, of each position."""
    doc_start = torch.zeros(1, len(tokens), dtype=torch.bool)
    doc_start[0, starts] = True
    windows = addressing.windows(torch.tensor([tokens]), doc_start=doc_start)
    return [tuple(window) for window in windows[0].tolist()], addressing.rows(windows, layer)[1][0].tolist()


def naive_head(ngrams, rows):
    """Occupied rows, collided n-grams, whether each collides, and the mean over positions of what the most frequent
    n-gram of their row has of its reads. ``ngrams``, ``rows``: those of every position."""
    readers = defaultdict(Counter)
    for ngram, row in zip(ngrams, rows, strict=True):
        readers[row][ngram] += 1
    collides = {ngram: len(readers[row]) > 1 for ngram, row in zip(ngrams, rows, strict=True)}
    shares = [max(readers[row].values()) / sum(readers[row].values()) for row in rows]
    return len(readers), collides, sum(shares) / len(shares)


@given(
    tokens=st.lists(st.integers(0, 7), min_size=1, max_size=80),
    rows_per_head=st.sampled_from([2, 9, 400, (3, 90, 300)]),
    heads=st.sampled_from([1, 3, (1, 3, 2)]),
    scheme=st.sampled_from(["engram", "qwen_ple"]),
)
def test_collisions_against_dictionaries(make_vocab, tokens, rows_per_head, heads, scheme):
    if scheme == "qwen_ple":  # as many rows and heads for every order, and raw ids
        rows_per_head, heads, tokens = 9, 2, [token % 5 for token in tokens]
    config = dataclasses.replace(CONFIG, rows_per_head=rows_per_head, heads=heads, scheme=scheme)
    addressing = Addressing(config, make_vocab(8, 5) if scheme == "engram" else None)
    starts = sorted({0, len(tokens) // 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collisions_module, "_PIECE", 7)
        found = table_collisions(addressing, distinct_ngrams(addressing, np.array(tokens), np.array(starts)))
    assert [(one.layer, one.order) for one in found] == [(layer, order) for layer in (1, 4) for order in (2, 3, 4)]
    for one in found:
        windows, rows = windows_and_rows(addressing, tokens, starts, one.layer)
        ngrams = [window[: one.order] for window in windows]
        primes = addressing.layouts[one.layer].primes[one.order - 2]
        first = sum(config.per_order("heads")[: one.order - 2])
        everywhere = dict.fromkeys(ngrams, True)
        for number, (head, prime) in enumerate(zip(one.heads, primes, strict=True)):
            occupied, collides, dominance = naive_head(ngrams, [row[first + number] for row in rows])
            assert (head.rows, head.occupied) == (prime, occupied)
            assert head.collided == pytest.approx(sum(collides.values()) / len(collides))
            assert head.collided_positions == pytest.approx(sum(collides[ngram] for ngram in ngrams) / len(ngrams))
            assert head.dominance == pytest.approx(dominance)
            assert head.expected_collided == pytest.approx(1 - (1 - 1 / prime) ** (len(set(ngrams)) - 1))
            assert head.expected_occupied == pytest.approx(prime * (1 - (1 - 1 / prime) ** len(set(ngrams))))
            everywhere = {ngram: both and collides[ngram] for ngram, both in everywhere.items()}
        assert (one.ngrams, one.positions) == (len(set(ngrams)), len(tokens))
        assert one.in_every_head == pytest.approx(sum(everywhere.values()) / len(everywhere))
        assert one.in_every_head_positions == pytest.approx(sum(everywhere[ngram] for ngram in ngrams) / len(ngrams))
        assert one.expected_in_every_head == pytest.approx(np.prod([head.expected_collided for head in one.heads]))


@given(tokens=st.lists(st.integers(0, 7), min_size=1, max_size=60))
def test_distinct_ngrams_are_those_of_the_windows(make_vocab, tokens):
    addressing, starts = Addressing(CONFIG, make_vocab(8, 5)), sorted({0, len(tokens) // 3})
    windows, _ = windows_and_rows(addressing, tokens, starts, 1)
    for one in distinct_ngrams(addressing, np.array(tokens), np.array(starts)):
        ngrams = [tuple(window[: one.order]) for window in one.windows.tolist()]
        assert len(set(ngrams)) == len(ngrams)
        assert dict(zip(ngrams, one.counts.tolist(), strict=True)) == Counter(w[: one.order] for w in windows)


@pytest.mark.parametrize(("ngrams", "rows"), [(1, 7), (2, 2), (40, 13), (100, 300)])
def test_what_is_expected_is_the_mean_over_random_hashes(ngrams, rows):
    draws = np.random.default_rng(0).integers(rows, size=(4000, ngrams))
    sharing = np.stack([np.bincount(draw, minlength=rows) for draw in draws])
    collided = (np.take_along_axis(sharing, draws, axis=1) > 1).mean(axis=1)
    occupied = (sharing > 0).sum(axis=1)
    for found, observed in ((expected_collided(ngrams, rows), collided), (expected_occupied(ngrams, rows), occupied)):
        assert found == pytest.approx(observed.mean(), abs=5 * observed.std() / 4000**0.5 + 1e-12)


def test_expectations_keep_their_digits_in_large_tables():
    assert expected_collided(2, 10**12) == pytest.approx(1e-12, rel=1e-9)
    assert expected_occupied(1, 10**12) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("scheme", ["engram", "qwen_ple"])
def test_the_hashes_collide_as_often_as_random_ones(make_vocab, scheme):
    """Text with frequent and rare tokens; three standard deviations of the share are about 0.01 here."""
    config = dataclasses.replace(CONFIG, layers=(1,), vocab_size=3000, rows_per_head=20_000, heads=3, scheme=scheme)
    tokens = np.random.default_rng(1).zipf(1.3, 40_000).clip(max=3000) - 1
    addressing = Addressing(config, make_vocab(3000, 3000) if scheme == "engram" else None)
    for one in table_collisions(addressing, distinct_ngrams(addressing, tokens, np.array([0, 9000]))):
        for head in one.heads:
            assert 0.1 < head.expected_collided < 0.9
            assert head.collided == pytest.approx(head.expected_collided, abs=0.015)
            assert head.occupied == pytest.approx(head.expected_occupied, rel=0.02)
        assert one.in_every_head == pytest.approx(one.expected_in_every_head, abs=0.015)


def test_a_text_without_tokens_is_refused(make_vocab):
    with pytest.raises(ValueError, match="give a text with at least one"):
        distinct_ngrams(Addressing(CONFIG, make_vocab(8, 5)), np.zeros(0, np.uint16), np.zeros(0, np.int64))
