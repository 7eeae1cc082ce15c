"""Expansion of changed rows against its twin: through the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_engram.memory.patch_kernels import expand_changed_naive, expand_changed_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@settings(max_examples=25)
@given(
    st.integers(0, 40), st.integers(1, 5), st.integers(1, 9), st.integers(1, 70), st.booleans(), st.integers(0, 5),
    st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99),
)  # fmt: skip
@example(positions=130, columns=3, rows=3, dim=64, dead=True, gap=0, share=0.5, seed=0)
@example(positions=3, columns=2, rows=2, dim=1500, dead=False, gap=1, share=0.5, seed=0)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_changed_rows_are_written(
    dtype: torch.dtype, positions: int, columns: int, rows: int, dim: int, dead: bool, gap: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    kept = (torch.rand(positions) < 0.6).nonzero().squeeze(1).to(DEVICE) if dead else None
    inverse = torch.randint(rows, ((positions if kept is None else len(kept)) * columns,), device=DEVICE)
    changed = torch.rand(rows, device=DEVICE) < share
    values = torch.randn(rows, dim + gap, device=DEVICE).bfloat16().float()[:, :dim]  # exact in either type
    width = columns * dim
    before = torch.full((positions, width + gap), torch.nan, dtype=dtype, device=DEVICE)
    out, expected = before.clone()[:, :width], before.clone()[:, :width]
    expand_changed_naive(values, inverse, kept, changed, expected)
    assert expand_changed_triton(values, inverse, kept, changed, out) is out
    assert torch.equal(out.nan_to_num(9.0), expected.nan_to_num(9.0))
    if kept is None:
        whole = values[inverse].view(positions, width).to(dtype)
        written = changed[inverse].repeat_interleave(dim).view(positions, width)
        assert torch.equal(out.isnan(), ~written) and torch.equal(out[written], whole[written])


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    positions, dim = 2**26 + 3, 40  # 2.7e9 numbers
    out = torch.zeros(positions, dim, dtype=torch.bfloat16, device="cuda")
    inverse = torch.zeros(positions, dtype=torch.int64, device="cuda")
    inverse[-1] = 1
    changed = torch.tensor([False, True], device="cuda")
    expand_changed_triton(torch.full((2, dim), 3.0, device="cuda"), inverse, None, changed, out)
    assert out[-1].tolist() == [3.0] * dim and not out[-2].any()
