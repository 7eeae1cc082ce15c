"""Unique rows, expansion and merging: what ``torch.unique`` and a dense embedding's gradient say, bit for bit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.memory.segments import Segments, expand, merge, merge_naive, unique_rows

IDS = st.lists(st.integers(0, 2**40), max_size=5).flatmap(
    lambda pool: st.lists(st.sampled_from(pool or [7]), max_size=60)
)


@given(IDS)
def test_unique_rows(ids: list[int]) -> None:
    tensor = torch.tensor(ids, dtype=torch.int64)
    rows, first, segments = unique_rows(tensor)
    assert rows.tolist() == sorted(set(ids))
    assert first.tolist() == [ids.index(row) for row in rows.tolist()]
    assert rows[segments.inverse].tolist() == ids
    out = torch.full((len(ids), 1), -1)
    assert expand(rows[:, None], segments.inverse, out) is out and torch.equal(out[:, 0], tensor)
    ends = [*segments.starts.tolist(), len(ids)][1:]
    for row, start, end in zip(rows.tolist(), segments.starts.tolist(), ends, strict=True):
        assert segments.order[start:end].tolist() == [i for i, x in enumerate(ids) if x == row]


@given(st.integers(0, 9), st.integers(1, 5), st.data())
def test_merging_equals_its_definition_also_for_rows_that_nobody_reads(
    rows: int, width: int, data: st.DataObject
) -> None:
    inverse = data.draw(st.lists(st.integers(0, rows - 1), max_size=60)) if rows else []
    segments = Segments.of(torch.tensor(inverse, dtype=torch.int64), rows)
    whole = torch.randint(-999, 999, (len(inverse), width)).float()  # sums of whole numbers are exact in any order
    expected = torch.zeros(rows, width)
    for read, row in enumerate(inverse):
        expected[row] += whole[read]
    assert torch.equal(merge(whole, segments), expected)
    assert torch.equal(merge_naive(whole, segments), expected)
    real = torch.randn(len(inverse), width).bfloat16()
    merged = merge(real, segments)
    out = torch.full((rows, width), torch.nan)
    assert merge(real, segments, out=out) is out and torch.equal(out, merged)
    assert torch.equal(merge(real, segments, out=out, adds=True), 2 * merged)
    assert merged.dtype == torch.float32
    assert torch.allclose(merged, merge_naive(real, segments), atol=1e-5)


def test_merging_does_not_depend_on_threads_or_runs() -> None:
    _, _, segments = unique_rows(torch.randint(300, (40_000,)))
    grads = torch.randn(40_000, 17)
    once = merge(grads, segments)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            for _ in range(5):
                assert torch.equal(merge(grads, segments), once)
    finally:
        torch.set_num_threads(threads)


def test_devices_merge_alike(device: torch.device) -> None:
    ids, grads = torch.randint(50, (3000,)), torch.randint(-99, 99, (3000, 5)).float()
    rows, first, segments = unique_rows(ids.to(device))
    here = unique_rows(ids)
    assert torch.equal(rows.cpu(), here[0]) and torch.equal(first.cpu(), here[1])
    found = merge(grads.to(device), segments)
    assert torch.equal(found.cpu(), merge(grads, here[2]))
    assert torch.equal(merge(grads.to(device), segments), found)
