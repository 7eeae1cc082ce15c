"""Tokens that end an n-gram of the trained windows, against a set of tuples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.analysis.seen import seen_before
from torch_engram.data import PackedBatches, TokenFile


def token_file(tokens: list[int]) -> TokenFile:
    starts = np.zeros(1, np.int64)
    return TokenFile(Path("none"), np.array(tokens, np.uint16), starts, len(tokens), 8, 0, "none")


@given(
    st.lists(st.integers(0, 3), min_size=9, max_size=60),
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_equals_a_set_of_tuples(
    trained: list[int], held_out: list[int], order: int, batch: int, batches: int, seed: int
) -> None:
    data, length = PackedBatches(token_file(trained), batch, 4, seed), 4
    known = set()
    for window in data.windows_of(0, batches).tolist():
        here = trained[window * length : window * length + length + 1]
        known |= {tuple(here[at : at + order]) for at in range(len(here) - order + 1)}
    wanted = [at + 1 >= order and tuple(held_out[at + 1 - order : at + 1]) in known for at in range(len(held_out))]
    assert seen_before(token_file(held_out), data, batches, order=order).tolist() == wanted


def test_windows_are_those_of_the_batches() -> None:
    data = PackedBatches(token_file(list(range(8)) * 9), 2, 4, seed=3)
    found = torch.cat([data.batch(step).tokens for step in range(2, 12)])
    firsts = data.windows_of(2, 12)
    wanted = np.stack([data.token_file.tokens[first * 4 : first * 4 + 4] for first in firsts])
    assert found.tolist() == wanted.tolist()
