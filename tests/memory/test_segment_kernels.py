"""The Triton forms of expand and merge against their twins: through the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_engram.memory.segment_kernels import expand_triton, merge_triton
from torch_engram.memory.segments import Segments, merge_naive

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
sizes = given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 70))


def reads_of(reads: int, rows: int) -> torch.Tensor:
    """Row 0 is read most, the last ones hardly ever."""
    return (torch.rand(reads).pow(3) * rows).long()


@settings(max_examples=15)
@sizes
@example(reads=130, rows=3, dim=64)
@example(reads=33, rows=33, dim=1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(dtype: torch.dtype, reads: int, rows: int, dim: int) -> None:
    segments = Segments.of(reads_of(reads, rows).to(DEVICE), rows)
    grads = torch.randn(reads, dim).to(DEVICE, dtype)
    out = torch.full((rows, dim), torch.nan, device=DEVICE)
    assert merge_triton(grads, segments.order, segments.starts, out) is out
    torch.testing.assert_close(out, merge_naive(grads.double(), segments), rtol=1e-5, atol=1e-5, check_dtype=False)
    again = torch.full_like(out, torch.nan)
    assert torch.equal(merge_triton(grads, segments.order, segments.starts, again), out)


@settings(max_examples=15)
@sizes
@example(reads=130, rows=3, dim=64)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expand(dtype: torch.dtype, reads: int, rows: int, dim: int) -> None:
    values, inverse = torch.randn(rows, dim, device=DEVICE), reads_of(reads, rows).to(DEVICE)
    out = torch.full((reads, dim), torch.nan, device=DEVICE, dtype=dtype)
    assert expand_triton(values, inverse, out) is out
    # The interpreter cuts a number off where a GPU rounds it, so there a unit in the last place is allowed.
    slack = 0.0 if DEVICE.type == "cuda" or dtype == torch.float32 else 2**-7
    torch.testing.assert_close(out, values[inverse].to(dtype), rtol=slack, atol=0.0)


def test_no_rows_are_no_work() -> None:
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    grads = torch.empty(0, 4, device=DEVICE)
    assert merge_triton(grads, nothing, nothing, torch.empty(0, 4, device=DEVICE)).shape == (0, 4)
    assert expand_triton(grads, nothing, grads).shape == (0, 4)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    reads, dim = 2**26 + 3, 40  # 2.7e9 gradients
    grads = torch.zeros(reads, dim, dtype=torch.bfloat16, device="cuda")
    grads[-1] = 3
    inverse = torch.zeros(reads, dtype=torch.int64, device="cuda")
    inverse[-1] = 1
    segments = Segments.of(inverse, 2)
    merged = merge_triton(grads, segments.order, segments.starts, torch.empty(2, dim, device="cuda"))
    assert merged[1].tolist() == [3.0] * dim and not merged[0].any()
    out = expand_triton(merged, inverse, grads)
    assert out[-1].tolist() == [3.0] * dim and not out[-2].any()
