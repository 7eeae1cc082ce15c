"""The Triton form of the fusion against its twin, forward and gradients: through the interpreter on a CPU, else
compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.config import EngramConfig
from torch_engram.fusion import Engram, fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN."""

    class Poisoned:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def empty(self, *size: Any, **options: Any) -> Tensor:
            return torch.empty(*size, **options).fill_(torch.nan)

        def empty_like(self, like: Tensor) -> Tensor:
            return torch.full_like(like, torch.nan)

    monkeypatch.setattr(fused, "torch", Poisoned())


@pytest.fixture(autouse=True)
def short_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter gets tiles of many rows and few steps, which has more edges and takes less time."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(fused, "_STEPS", 5)
        monkeypatch.setattr(fused, "_WALKERS", 32)


def make(**fields: Any) -> Engram:
    config = EngramConfig(**{**dict(layers=(0,), hidden=8, vocab_size=50, heads=1, row_dim=5, branches=2), **fields})
    engram = Engram(config).to(DEVICE)
    for parameter in engram.parameters():
        torch.nn.init.normal_(parameter, mean=0.3, std=0.5)
    return engram


def results(engram: Engram, form: str, inputs: list[Tensor], masks: list[Tensor | None]) -> list[Tensor]:
    """Streams, gates, and the gradients of inputs and parameters under a loss that reads both."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    engram.zero_grad()
    streams, alpha = getattr(engram, form)(*inputs, *masks)
    assert streams.dtype == inputs[0].dtype and alpha.dtype == torch.float32
    torch.manual_seed(1)
    wanted = [torch.randn(tensor.shape).to(tensor) for tensor in (streams, alpha)]
    torch.autograd.backward((streams, alpha), wanted)
    used = [p for name, p in engram.named_parameters() if not name.startswith("wkv")]
    return [streams, alpha, *(x.grad for x in [*inputs, *used] if x.grad is not None)]


def compare(engram: Engram, inputs: list[Tensor], masks: list[Tensor | None], rtol: float) -> None:
    """Each result within ``rtol`` of the twin's on the same numbers in fp32, as a share of its size.

    A style that rounds on the way to the gate loses more than that, wherever a score is near zero and its root steep.
    It may lose four times what its twin loses in that type: the interpreter truncates and does not round.
    """
    expected = results(engram, "fuse_naive", [tensor.float() for tensor in inputs], masks)
    found = results(engram, "fuse_triton", inputs, masks)
    rounded = results(engram, "fuse_naive", inputs, masks) if engram.style.casts_after_norms else expected
    assert len(found) == len(expected)
    for mine, theirs, lossy in zip(found, expected, rounded, strict=True):
        assert mine.isfinite().all()
        size = theirs.float().norm().clamp_min(1e-3)
        error, loss = ((x.float() - theirs.float()).norm() / size for x in (mine, lossy))
        assert error < rtol + 4 * loss, f"{tuple(mine.shape)}: {error:.2e}"


def compare_random(
    engram: Engram, batch: int, tokens: int, dtype: torch.dtype, masked: bool, starts: float = 0.2
) -> None:
    """``compare`` on random numbers; where ``masked``, with dead tokens and documents that start with a chance of
    ``starts``."""
    branches, hidden = engram.config.branches, engram.config.hidden
    streams = torch.randn(batch, tokens, branches, hidden).to(DEVICE, dtype)
    keys_value = torch.randn(batch, tokens, (branches + 1) * hidden).to(DEVICE, dtype)
    masks: list[Tensor | None] = [None, None]
    if masked:
        masks = [(torch.rand(batch, tokens) < share).to(DEVICE) for share in (0.8, starts)]
    compare(engram, [streams, keys_value], masks, rtol=1e-3 if dtype == torch.float32 else 2e-2)


@settings(max_examples=1, phases=(Phase.explicit, Phase.generate))  # an example takes too long to shrink
@given(
    fusion=st.sampled_from(("paper", "deepseek-v4.1", "qwen-ple")), branches=st.integers(1, 4),
    hidden=st.integers(1, 130), taps=st.sampled_from((0, 2, 3, 4)), order=st.integers(2, 4), batch=st.integers(1, 3),
    tokens=st.integers(1, 45), masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@example(fusion="paper", branches=4, hidden=65, taps=4, order=3, batch=2, tokens=37, masked=True, seed=0)
@example(fusion="qwen-ple", branches=4, hidden=65, taps=4, order=3, batch=1, tokens=37, masked=True, seed=0)
@example(fusion="paper", branches=1, hidden=64, taps=4, order=3, batch=1, tokens=64, masked=False, seed=0)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_naive_form(
    dtype: torch.dtype, fusion: str, branches: int, hidden: int, taps: int, order: int, batch: int, tokens: int,
    masked: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    engram = make(fusion=fusion, branches=branches, hidden=hidden, conv_kernel=taps, max_ngram=order)
    compare_random(engram, batch, tokens, dtype, masked)


@pytest.mark.parametrize(
    "dilation, tokens, starts",
    [(1, 40, 0.2), (2, 31, 1.0), (3, 4, 0.0), (3, 33, 0.3)],
    ids=["neighbours", "documents of one token", "shorter than the reach", "odd"],
)
def test_rows_cross_documents_and_sequences(
    dilation: int, tokens: int, starts: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngramConfig, "conv_dilation", dilation)
    torch.manual_seed(0)
    compare_random(make(branches=3, hidden=130), 2, tokens, torch.float32, True, starts)


def test_rows_as_long_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    compare_random(make(branches=2, hidden=12, conv_kernel=2), 1, 110, torch.float32, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [6144, 8192])
def test_wide(hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    compare_random(make(branches=4, hidden=hidden, heads=8, row_dim=384), 2, 300, dtype, True)


@pytest.mark.gpu
def test_gates_have_the_roundings_of_the_style() -> None:
    """A sum taken in another order may fall on the other side of a rounding, and then move the gate by one or two."""
    torch.manual_seed(0)
    engram = make(fusion="qwen-ple", branches=4, hidden=256)
    inputs = [torch.randn(2, 500, *width, device=DEVICE, dtype=torch.bfloat16) for width in ((4, 256), (5 * 256,))]
    gates, expected = (getattr(engram, form)(*inputs)[1] for form in ("fuse_triton", "fuse_naive"))
    assert (gates == gates.bfloat16()).all()
    assert (gates == expected).float().mean() > 0.9
    torch.testing.assert_close(gates, expected, rtol=2**-6, atol=0)
