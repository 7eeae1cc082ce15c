"""Batches: every window once an epoch, document starts where they are, and any step computable alone."""

import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_engram.data import IGNORE_INDEX, Batch, PackedBatches, TokenFile, TokenFiles
from torch_engram.data.batches import permute

Builder = Callable[[Iterable[int]], TokenFile]
LENGTHS = st.lists(st.integers(1, 20), min_size=3, max_size=40)


def same(one: Batch, other: Batch) -> bool:
    pairs = zip((one.tokens, one.targets, one.doc_start), (other.tokens, other.targets, other.doc_start), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def naive(file: TokenFile, first: int, seq_len: int) -> tuple[list[int], list[int], list[bool]]:
    """One window by a plain loop over its positions."""
    stream, starts = file.tokens.tolist(), set(file.starts.tolist())
    tokens, targets, doc_start = [], [], []
    for position in range(first, first + seq_len):
        tokens.append(stream[position])
        targets.append(IGNORE_INDEX if position + 1 in starts else stream[position + 1])
        doc_start.append(position == first or position in starts)
    return tokens, targets, doc_start


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 5))
def test_windows_in_order_equal_the_naive_loop(
    token_file_of: Builder, lengths: list[int], seq_len: int, batch_size: int
) -> None:
    file = token_file_of([*lengths, 10])
    batches = PackedBatches(file, batch_size, seq_len)
    assert batches.packs_documents == any(bool(batch.doc_start[:, 1:].any()) for batch in batches.in_order())
    rows = [
        (tokens.tolist(), targets.tolist(), doc_start.tolist())
        for batch in batches.in_order()
        for tokens, targets, doc_start in zip(batch.tokens, batch.targets, batch.doc_start, strict=True)
    ]
    assert rows == [naive(file, window * seq_len, seq_len) for window in range(batches.windows)]
    assert (batches.windows + 1) * seq_len + 1 > len(file), "a whole window was dropped"


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 7), st.integers(0, 2**63 - 1))
def test_every_window_comes_exactly_once_per_epoch(
    token_file_of: Builder, lengths: list[int], seq_len: int, batch_size: int, seed: int
) -> None:
    file = token_file_of([*lengths, 10])
    batches = PackedBatches(file, batch_size, seq_len, seed)
    steps = range(-(-3 * batches.windows // batch_size))
    windows = [tuple(row) for step in steps for row in batches.batch(step).tokens.tolist()]
    expected = sorted(tuple(row) for batch in batches.in_order() for row in batch.tokens.tolist())
    for epoch in range(3):
        assert sorted(windows[epoch * batches.windows : (epoch + 1) * batches.windows]) == expected


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**63), 2**64 - 1), st.integers(0, 10_000))
def test_the_permutation_is_one(size: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(size), size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))


def test_the_permutation_is_evaluated_pointwise_and_far_out() -> None:
    positions = np.array([0, 1, 2**40 - 1, 123_456_789_012])
    order = permute(positions, 2**40, 1, 0)
    assert order.tolist() == [int(permute(positions[i : i + 1], 2**40, 1, 0)[0]) for i in range(4)]
    assert len(set(order.tolist())) == 4 and order.min() >= 0 and order.max() < 2**40


def test_the_order_never_changes_between_versions() -> None:
    # Resuming an older run must see its batches again: these numbers are part of the format.
    assert permute(np.arange(10), 10, 1234, 0).tolist() == [6, 8, 2, 9, 7, 0, 1, 3, 4, 5]
    assert permute(np.arange(10), 10, 1234, 1).tolist() == [7, 0, 1, 3, 6, 2, 9, 8, 4, 5]


def test_seeds_and_epochs_give_orders_that_look_independent() -> None:
    size = 1000
    orders = [permute(np.arange(size), size, seed, epoch) for seed in range(4) for epoch in range(4)]
    for one, other in itertools.combinations([np.arange(size), *orders], 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
        assert np.count_nonzero(one == other) < 10


def test_every_epoch_and_seed_has_an_order_of_its_own(token_files: TokenFiles) -> None:
    batches = PackedBatches(token_files.train, 1, 20, seed=1)
    orders = [
        torch.cat(
            [PackedBatches(token_files.train, 1, 20, seed).batch(epoch * batches.windows + i).tokens for i in range(50)]
        )
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert batches.windows > 50
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(orders, 2))


def test_a_batch_follows_from_its_number_alone(token_files: TokenFiles) -> None:
    whole = PackedBatches(token_files.train, 3, 64, seed=5)
    seen = [whole.batch(step) for step in range(40)]
    for step in (39, 0, 7):
        assert same(PackedBatches(token_files.train, 3, 64, seed=5).batch(step), seen[step])


def test_batches_of_another_size_hold_the_same_windows(token_files: TokenFiles) -> None:
    small, large = (PackedBatches(token_files.train, size, 50, seed=3) for size in (2, 4))
    rows = torch.cat([small.batch(2).tokens, small.batch(3).tokens])
    assert torch.equal(rows, large.batch(1).tokens)


def test_shapes_types_and_independence_of_the_file(token_files: TokenFiles) -> None:
    batch = PackedBatches(token_files.train, 3, 64).batch(0)
    for tensor, dtype in ((batch.tokens, torch.int64), (batch.targets, torch.int64), (batch.doc_start, torch.bool)):
        assert tensor.shape == (3, 64) and tensor.dtype == dtype and tensor.is_contiguous()
    batch.tokens.zero_()  # a view of the read-only file would fail here
    assert same(batch.to("cpu"), batch)


def test_no_target_crosses_into_the_next_document(token_files: TokenFiles) -> None:
    file = token_files.train
    for batch in PackedBatches(file, 4, 100).in_order():
        assert torch.equal(batch.targets == IGNORE_INDEX, batch.tokens == file.end_id)


def test_a_file_shorter_than_a_sequence_is_refused_with_its_numbers(token_file_of: Builder) -> None:
    file = token_file_of([5, 4])
    assert PackedBatches(file, 1, 8).windows == 1
    with pytest.raises(ValueError, match=r"known\.bin has 9 tokens and one sequence of seq_len=9 needs 10"):
        PackedBatches(file, 1, 9)
    with pytest.raises(ValueError, match="batch_size is 0"):
        PackedBatches(file, 0, 4)
    with pytest.raises(ValueError, match="seq_len is 0"):
        PackedBatches(file, 1, 0)
