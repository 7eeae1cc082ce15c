"""A step of decoding by NumPy and by one kernel, against the general form: through the interpreter on a CPU, else
compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_engram.config import FUSIONS, EngramConfig
from torch_engram.fusion import Engram
from torch_engram.fusion.decode_kernels import fuse_step_triton
from torch_engram.fusion.decoding import fuse_step_numpy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HELD = 3
"""Positions in the state besides those that the convolution sees."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel leaves unwritten is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))


@settings(max_examples=12)
@given(
    fusion=st.sampled_from(FUSIONS), branches=st.integers(1, 4), hidden=st.integers(1, 130),
    taps=st.integers(2, 4), order=st.integers(2, 4), sequences=st.integers(0, 3), masked=st.booleans(),
    started=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@example("paper", 1, 65, 4, 3, 3, True, True, 0)
@example("qwen-ple", 3, 65, 4, 3, 2, True, True, 0)
@pytest.mark.parametrize("form, dtype", [
    (fuse_step_numpy, torch.float32), (fuse_step_triton, torch.float32), (fuse_step_triton, torch.bfloat16),
])  # fmt: skip
@torch.no_grad()
def test_equals_the_general_form(
    form, dtype: torch.dtype, fusion: str, branches: int, hidden: int, taps: int, order: int, sequences: int,
    masked: bool, started: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    device = torch.device("cpu") if form is fuse_step_numpy else DEVICE
    config = EngramConfig(
        layers=(0,), hidden=hidden, vocab_size=50, heads=1, row_dim=5, branches=branches, fusion=fusion,
        conv_kernel=taps, max_ngram=order,
    )  # fmt: skip
    engram = Engram(config).to(device, dtype)
    for parameter in engram.parameters():
        torch.nn.init.normal_(parameter, mean=0.3, std=0.5)
    assert engram.convolution is not None
    positions = engram.convolution.reach + HELD
    streams = torch.randn(sequences, 1, branches, hidden).to(device, dtype)
    keys_value = torch.randn(sequences, 1, (branches + 1) * hidden).to(device, dtype)
    live = (torch.rand(sequences, 1) < 0.7).to(device) if masked else None
    start = (torch.rand(sequences, 1) < 0.5).to(device) if started else None
    state = engram.new_state(drafts=HELD + 1)
    state.push(
        torch.randn(sequences, positions, branches, hidden).to(device, dtype),
        torch.randint(2 * positions, (sequences, positions)).to(device),
    )
    other, near = copy.deepcopy(state), 1e-4 if dtype == torch.float32 else 4e-2  # the interpreter truncates bf16
    expected = engram.fuse_naive(streams, keys_value, live, start, state)
    found = form(engram, streams, keys_value, live, start, *other.advance())
    for mine, theirs in zip((*found, *other._held()), (*expected, *state._held()), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=near, atol=near)
