"""Kernels around the experts against their twins: through Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.models import moe as module
from torch_engram.models.config import MoEConfig
from torch_engram.models.moe import MoE, moe_naive
from torch_engram.models.moe_fused import count_fused, moe_fused
from torch_engram.models.moe_kernels import order_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is not a number."""
    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        real = getattr(owner, name)

        def poison(*args: object, real: Callable[..., Tensor] = real, **options: object) -> Tensor:
            made = real(*args, **options)
            return made.fill_(torch.nan if made.is_floating_point() else -(1 << 30))

        monkeypatch.setattr(owner, name, poison)


def choices(tokens: int, experts: int, top_k: int) -> Tensor:
    """Low numbers are chosen most; the highest perhaps never."""
    return (torch.rand(tokens, experts) * torch.linspace(1, 0.3, experts)).topk(top_k, dim=-1).indices.to(DEVICE)


@settings(max_examples=5)
@given(st.integers(1, 400), st.integers(1, 70), st.integers(1, 4), st.booleans())
@example(tokens=700, experts=512, top_k=3, masked=True)
@example(tokens=1025, experts=1, top_k=1, masked=False)
def test_order_and_count(tokens: int, experts: int, top_k: int, masked: bool) -> None:
    chosen = choices(tokens, experts, min(top_k, experts))
    flat = chosen.flatten()
    order, inverse, ends = order_triton(chosen, experts)
    assert torch.equal(order.long(), flat.sort(stable=True).indices)
    assert torch.equal(inverse.flatten()[order.long()].long(), torch.arange(len(flat), device=DEVICE))
    assert torch.equal(ends.long(), torch.bincount(flat, minlength=experts).cumsum(0))
    assert {order.dtype, inverse.dtype, ends.dtype} == {torch.int32} and inverse.shape == chosen.shape
    live = torch.rand(tokens, device=DEVICE) < 0.5 if masked else None
    counted = flat if live is None else chosen[live].flatten()
    assert torch.equal(count_fused(chosen, live, experts), torch.bincount(counted, minlength=experts).float())


SIZES = [(1, 8, 3, 8, 1), (33, 24, 7, 8, 3), (50, 40, 29, 24, 4), (9, 16, 2, 40, 2)]


def leaves(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    tokens, hidden, experts, inner, top_k = size
    x, shared = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens, hidden).to(dtype)
    gate_up = torch.randn(experts, hidden, 2 * inner) * hidden**-0.5
    down = torch.randn(experts, inner, hidden) * inner**-0.5
    made = (x, torch.rand(tokens, top_k), gate_up, down, shared)
    return choices(tokens, experts, top_k), tuple(tensor.to(DEVICE).requires_grad_() for tensor in made)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_shared", [False, True])
def test_equals_the_twin(size: tuple[int, ...], dtype: torch.dtype, with_shared: bool, poisoned: None) -> None:
    chosen, inputs = leaves(size, dtype)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    given = slice(None) if with_shared else slice(4)
    twin = moe_naive(exact[0], chosen, *exact[1:4]) + (exact[4] if with_shared else 0.0)
    mine = moe_fused(inputs[0], chosen, *inputs[1:][given] if with_shared else inputs[1:4])
    assert mine.dtype == dtype
    grad = torch.randn(twin.shape, device=DEVICE).to(dtype)
    got = [mine, *torch.autograd.grad(mine, inputs[given], grad)]
    expected = [twin, *torch.autograd.grad(twin, exact[given], grad.float())]
    slack = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=2**-5, atol=2**-5)
    for a, b in zip(got, expected, strict=True):
        scale = b.abs().max().clamp_min(1.0)
        torch.testing.assert_close(a.float() / scale, b / scale, **slack)


def test_bits_repeat_and_an_expanded_gradient_is_taken() -> None:
    chosen, inputs = leaves((33, 24, 7, 8, 3), torch.float32)
    first, second = (torch.autograd.grad(moe_fused(inputs[0], chosen, *inputs[1:]).sum(), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_traced_whole_and_recomputed(monkeypatch: pytest.MonkeyPatch, autocast: bool, recompute: bool) -> None:
    """One graph without breaks, with the gradients of the eager call and of the other devices' path."""
    moe = MoE(MoEConfig(5, 2, 16, shared_hidden=8), 16, 2).to(DEVICE)
    x = torch.randn(2, 9, 16, device=DEVICE).requires_grad_()
    wanted = [x, *moe.parameters()]

    def run(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            y = torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False) if recompute else moe(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        return y.float().square().sum()

    plain = torch.autograd.grad(run(x), wanted)
    monkeypatch.setattr(module, "moe_grouped", moe_fused)
    eager = torch.autograd.grad(run(x), wanted)
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)(x), wanted)
    slack = dict(rtol=2**-4, atol=2**-4) if autocast else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(eager, plain, **slack)
    torch.testing.assert_close(got, eager, **slack)
