"""The choice of experts against its twin: through Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.models import moe as module
from torch_engram.models.config import MoEConfig
from torch_engram.models.moe import MoE
from torch_engram.models.router import choose_naive
from torch_engram.models.router_fused import _choose, _choose_backward, choose_fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def leaves(tokens: int, experts: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, experts, device=DEVICE).requires_grad_(), 0.1 * torch.randn(experts, device=DEVICE)


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 70), st.integers(1, 8), st.integers(0, 999))
@example(tokens=5, experts=1000, top_k=8, seed=0)
@example(tokens=300, experts=3, top_k=3, seed=0)
def test_equals_the_twin(tokens: int, experts: int, top_k: int, seed: int) -> None:
    torch.manual_seed(seed)
    (logits, bias), top_k = leaves(tokens, experts), min(top_k, experts)
    grad = torch.randn(tokens, top_k, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        real = Tensor.new_empty

        def poison(*arguments: object, **options: object) -> Tensor:
            """What a kernel forgets to write is not a number."""
            made = real(*arguments, **options)
            return made.fill_(torch.nan if made.is_floating_point() else -1)

        patch.setattr(Tensor, "new_empty", poison)
        chosen, gates = choose_fused(logits, bias, top_k)
        got = torch.autograd.grad(gates, logits, grad)
    twin, twin_gates = choose_naive(logits, bias, top_k)
    expected = torch.autograd.grad(twin_gates, logits, grad)
    same = (chosen == twin).all(1)
    assert chosen.dtype == torch.int64 and (~same).sum() <= 1  # exponentials differ in their last bit: a near tie
    torch.testing.assert_close(gates[same], twin_gates[same], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[0][same], expected[0][same], rtol=1e-4, atol=1e-6)


def test_the_lower_expert_wins_a_tie_and_no_number_is_above_all() -> None:
    """As a stable sort has it, each expert at most once, infinities and what is not a number included."""
    worst = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 30.0, 40.0])
    rows = torch.cat((worst[torch.randint(8, (60, 9))], torch.full((1, 9), torch.nan), torch.zeros(1, 9))).to(DEVICE)
    for bias in (torch.zeros(9), torch.full((9,), -float("inf")), torch.tensor([0.0, -0.5, -2.0] * 3)):
        ranked = rows.sigmoid() + bias.to(DEVICE)
        expected = ranked.sort(dim=1, descending=True, stable=True).indices
        for top_k in (1, 4, 9):
            assert torch.equal(choose_fused(rows, bias.to(DEVICE), top_k)[0], expected[:, :top_k])


def test_strided_logits_narrow_bias_and_bits_that_repeat() -> None:
    logits = torch.randn(7, 40, device=DEVICE).t().requires_grad_()
    bias = torch.randn(7, device=DEVICE).bfloat16()
    first, second = (choose_fused(logits, bias, 3) for _ in range(2))
    assert torch.equal(first[0], choose_naive(logits, bias, 3)[0])
    grads = [torch.autograd.grad(gates.sum(), logits) for _, gates in (first, second)]  # an expanded gradient
    assert torch.equal(first[1], second[1]) and torch.equal(*(grad for (grad,) in grads))
    assert not first[0].requires_grad


def test_operators_say_their_shapes_right() -> None:
    logits, bias = leaves(9, 5)
    torch.library.opcheck(_choose, (logits.detach(), bias, 2))
    chosen, gates, scores = _choose(logits.detach(), bias, 2)
    torch.library.opcheck(_choose_backward, (gates, chosen, scores, 5))


@pytest.mark.parametrize("recompute", [False, True])
def test_traced_whole_and_recomputed(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """One graph without breaks, with the gradients of the eager call and of the other devices' path."""
    moe = MoE(MoEConfig(5, 2, 16), 16, 2).to(DEVICE)
    x = torch.randn(11, 16, device=DEVICE).requires_grad_()

    def gates(x: Tensor) -> Tensor:
        chosen, gates = moe.route(x)
        return gates * chosen

    def run(x: Tensor) -> Tensor:
        y = torch.utils.checkpoint.checkpoint(gates, x, use_reentrant=False) if recompute else gates(x)
        return y.square().sum()

    def gradients(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x), (x, moe.router))

    monkeypatch.setattr(module, "choose", choose_naive)
    plain = gradients(run)
    monkeypatch.setattr(module, "choose", choose_fused)
    eager = gradients(run)
    got = gradients(torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False))
    torch.testing.assert_close(eager, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, eager)
