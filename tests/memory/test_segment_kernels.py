"""The Triton forms of unique, expand and merge against their twins: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.memory import segment_kernels
from torch_engram.memory.segment_kernels import expand_triton, merge_triton, unique_triton
from torch_engram.memory.segments import Segments, expand, merge, merge_naive, unique_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
sizes = given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 70), st.integers(0, 3))


@pytest.fixture(scope="module", autouse=True, params=["as they are", "small"])
def tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """With small tiles, small cases have rows with no cut, with one, and with more than a program adds at once."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "small":
            patch.setattr(segment_kernels, "_PIECE", 4)
            patch.setattr(segment_kernels, "_PIECES_AHEAD", 4)
            patch.setattr(segment_kernels, "_IDS", 16)
        yield


def reads_of(reads: int, rows: int) -> Tensor:
    """Row 0 is read most, the last ones hardly ever."""
    return (torch.rand(reads).pow(3) * rows).long()


def apart(rows: int, dim: int, gap: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows ``gap`` numbers apart from each other, with NaN between them."""
    wide = torch.full((rows, dim + gap), torch.nan, dtype=dtype)
    wide[:, :dim] = torch.randn(rows, dim)
    return wide.to(DEVICE)[:, :dim]


def check_merge(grads: Tensor, segments: Segments, rows: int) -> Tensor:
    out = torch.full((rows, grads.shape[1]), torch.nan, device=DEVICE)
    place = segments.inverse, segments.order, segments.starts
    assert merge_triton(grads, *place, out) is out
    torch.testing.assert_close(out, merge_naive(grads.double(), segments), rtol=1e-5, atol=1e-5, check_dtype=False)
    assert torch.equal(merge_triton(grads, *place, torch.full_like(out, torch.nan)), out)
    before = torch.randn_like(out)
    torch.testing.assert_close(merge_triton(grads, *place, before.clone(), adds=True), before + out)
    return out


@settings(max_examples=8)
@sizes
@example(reads=130, rows=3, dim=64, gap=0)
@example(reads=33, rows=33, dim=1, gap=1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(dtype: torch.dtype, reads: int, rows: int, dim: int, gap: int) -> None:
    segments = Segments.of(reads_of(reads, rows).to(DEVICE), rows)
    grads = apart(reads, dim, gap, dtype)
    out = check_merge(grads, segments, rows)
    torch.testing.assert_close(merge(grads, segments), out)


@pytest.mark.parametrize("reads", [3, 4, 5, 8, 9, 17])
def test_merge_of_rows_that_end_at_a_cut_and_around_it(reads: int) -> None:
    for rows in (1, 2):  # the second row begins at a cut, or beside it
        inverse = torch.cat([torch.full((reads,), row) for row in range(rows)])
        check_merge(apart(rows * reads, 3, 0), Segments.of(inverse.to(DEVICE), rows + 1), rows + 1)


def test_merge_adds_no_rows_to_each_other() -> None:
    inverse = reads_of(50, 6)
    grads = torch.randn(50, 5)
    grads[inverse == 2] = torch.nan
    grads[inverse == 4] = torch.inf
    segments = Segments.of(inverse.to(DEVICE), 6)
    out = torch.zeros(6, 5, device=DEVICE)
    merge_triton(grads.to(DEVICE), segments.inverse, segments.order, segments.starts, out)
    assert out[2].isnan().all() and out[4].isinf().all() and out[[0, 1, 3, 5]].isfinite().all()


def test_merge_and_expand_in_several_columns_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_kernels, "_COLUMNS", 8)
    inverse = reads_of(30, 4).to(DEVICE)
    check_merge(apart(30, 19, 2), Segments.of(inverse, 4), 4)
    values, out = apart(4, 19, 2), torch.full((30, 19), torch.nan, device=DEVICE)
    assert torch.equal(expand_triton(values, inverse, out), values[inverse])


def test_merge_of_gradients_that_share_their_memory() -> None:
    segments = Segments.of(reads_of(20, 4).to(DEVICE), 4)
    counts = merge(torch.ones(1, 1, device=DEVICE).expand(20, 6), segments)[:, 0].long()
    assert torch.equal(counts, segments.inverse.bincount(minlength=4))


@settings(max_examples=15)
@sizes
@example(reads=130, rows=3, dim=64, gap=0)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expand(dtype: torch.dtype, reads: int, rows: int, dim: int, gap: int) -> None:
    values, inverse = apart(rows, dim, gap), reads_of(reads, rows).to(DEVICE)
    out = torch.full((reads, dim), torch.nan, device=DEVICE, dtype=dtype)
    assert expand_triton(values, inverse, out) is out
    # The interpreter cuts a number off where a GPU rounds it, so there a unit in the last place is allowed.
    slack = 0.0 if DEVICE.type == "cuda" or dtype == torch.float32 else 2**-7
    torch.testing.assert_close(out, values[inverse].to(dtype), rtol=slack, atol=0.0)
    torch.testing.assert_close(expand(values, inverse, torch.full_like(out, torch.nan)), out, rtol=slack, atol=0.0)


@settings(max_examples=20)
@given(st.integers(1, 70), st.sampled_from([1, 5, 2**31, 2**31 + 1, 2**40]), st.booleans())
def test_unique(reads: int, rows: int, told: bool) -> None:
    ids = rows - 1 - reads_of(reads, min(rows, 60))
    distinct, first, *segments = unique_triton(ids.to(DEVICE), rows if told else None)
    wanted, wanted_first, wanted_segments = unique_rows(ids)
    for got, want in zip((distinct, first), (wanted, wanted_first), strict=True):
        assert got.dtype == torch.int64 and torch.equal(got.cpu(), want)
    for got, name in zip(segments, ("inverse", "order", "starts"), strict=True):
        assert got.dtype == torch.int64 and torch.equal(got.cpu(), getattr(wanted_segments, name))


def test_nothing_is_no_work() -> None:
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    grads = torch.empty(0, 4, device=DEVICE)
    assert merge_triton(grads, nothing, nothing, nothing, torch.empty(0, 4, device=DEVICE)).shape == (0, 4)
    assert expand_triton(grads, nothing, grads).shape == (0, 4)
    ids, first, segments = unique_rows(nothing, 5)
    assert len(ids) == len(first) == len(segments.inverse) == len(segments.starts) == 0


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    reads, dim = 2**26 + 3, 40  # 2.7e9 gradients
    grads = torch.zeros(reads, dim, dtype=torch.bfloat16, device="cuda")
    grads[-1] = 3
    inverse = torch.zeros(reads, dtype=torch.int64, device="cuda")
    inverse[-1] = 1
    merged = merge(grads, Segments.of(inverse, 2))
    assert merged[1].tolist() == [3.0] * dim and not merged[0].any()
    out = expand_triton(merged, inverse, grads)
    assert out[-1].tolist() == [3.0] * dim and not out[-2].any()
