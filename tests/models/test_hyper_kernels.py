"""Fused hyper-connections against their twins: through Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from torch_engram.models.hyper import HyperConnection, read_naive, write_naive
from torch_engram.models.hyper_fused import read_fused, write_fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(1, 1, 2, 3), (2, 5, 4, 16), (1, 33, 3, 70), (3, 3, 4, 129), (1, 3, 8, 24), (1, 2, 5, 300)]
BF16 = dict(rtol=2**-6, atol=2**-6)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is not a number."""
    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        real = getattr(owner, name)

        def poison(*args: object, real: Callable[..., Tensor] = real, **options: object) -> Tensor:
            made = real(*args, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(owner, name, poison)


def leaves(size: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Streams, output, weight, strength and static, everything away from its start."""
    torch.manual_seed(seed)
    batch, tokens, branches, width = size
    count = 2 * branches + branches**2
    streams = torch.randn(batch, tokens, branches, width).to(dtype)
    output = torch.randn(batch, tokens, width).to(dtype)
    weight = torch.randn(count, branches * width) * (branches * width) ** -0.5
    made = (streams, output, weight, torch.rand(3) + 0.5, torch.randn(count))
    return tuple(tensor.to(DEVICE).requires_grad_() for tensor in made)


def both_ways(read: Callable, write: Callable, inputs: tuple[Tensor, ...], iterations: int) -> list[Tensor]:
    """Everything that is computed on the way there, then all gradients."""
    streams, output, *parameters = inputs
    got, h_res, h_post, *through = read(streams, *parameters, iterations, 1e-6)
    written = write(*(through or [streams]), output * got, h_res, h_post)
    torch.manual_seed(1)
    grad = torch.randn(written.shape).to(written)
    return [got, h_res, h_post, written, *torch.autograd.grad(written, inputs, grad)]


@pytest.mark.parametrize(
    "size, dtype, iterations",
    [
        *product(SIZES, (torch.float32,), (1, 4)),  # streams of any type are mixed in fp32: the count is for it alone
        *product(SIZES[3:4], (torch.float32,), (20,)),
        *product(SIZES, (torch.bfloat16,), (2,)),
        *product(SIZES[3:4], (torch.float16,), (2,)),  # read and written as bf16 is
    ],
)
def test_equals_the_twin(size: tuple[int, int, int, int], dtype: torch.dtype, iterations: int) -> None:
    inputs = leaves(size, dtype)
    exact = both_ways(read_naive, write_naive, tuple(x.detach().float().requires_grad_() for x in inputs), iterations)
    got = both_ways(read_fused, write_fused, inputs, iterations)
    for number, (mine, twin) in enumerate(zip(got, exact, strict=True)):
        assert mine.dtype == (torch.float32 if number in (1, 2) or number > 5 else dtype)
        # Mixing depends on the streams alone, which are exact. What is read is rounded before it is written, and so are
        # the gradients that come back to it.
        close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 or number in (1, 2) else BF16
        scale = twin.abs().max().clamp_min(1.0)
        torch.testing.assert_close(mine.float() / scale, twin / scale, msg=lambda m, n=number: f"{n}: {m}", **close)


@pytest.mark.parametrize("branches", [2, 4, 7])
def test_parameters_of_mixing_are_exact_in_bf16(branches: int) -> None:
    """Streams in bf16 are exact; weights and gradients of coefficients are no bf16 numbers and do not become such."""
    streams, _, *parameters = leaves((2, 70 if DEVICE.type == "cuda" else 9, branches, 40), torch.bfloat16)
    grads = []
    for read, inputs in ((read_fused, streams), (read_naive, streams.detach().float())):
        _, h_res, h_post, *_ = read(inputs, *parameters, 20, 1e-6)
        torch.manual_seed(2)
        loss = (h_res * torch.randn(h_res.shape, device=DEVICE)).sum() + (h_post * torch.randn_like(h_post)).sum()
        grads.append(torch.autograd.grad(loss, parameters))
    for mine, twin in zip(*grads, strict=True):
        assert (mine - twin).norm() < 2e-5 * twin.norm()


@pytest.mark.parametrize("logits", [[0, -95, 0, -95], [0, -45, -45, -95], [0, 80, 0, 0], [-80, 0, 0, -80]])
def test_columns_of_very_different_size(logits: list[float]) -> None:
    """What is added to a column changes nothing: the first division takes it out again."""
    streams, output, weight, strength, static = leaves((1, 3, 2, 8), torch.float32)
    shifted = static.detach().clone().requires_grad_()
    with torch.no_grad():
        static[4:] = torch.tensor(logits)
        shifted[4:] = (static[4:].view(2, 2) - static[4:].view(2, 2).amax(0)).flatten()
    inputs = streams, output, weight, strength
    got = both_ways(read_fused, write_fused, (*inputs, static), 20)
    for mine, twin in zip(got, both_ways(read_naive, write_naive, (*inputs, shifted), 20), strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("branches", [2, 4, 8])
def test_far_from_balanced(branches: int) -> None:
    """Weights up to e**40 apart: neither factors nor their gradients leave fp32's range."""
    streams, output, weight, strength, static = leaves((1, 5, branches, 8), torch.float32)
    with torch.no_grad():
        static[2 * branches :] = 40 * torch.rand(branches**2, device=DEVICE)
    inputs = streams, output, weight, strength, static
    got, expected = (both_ways(*forms, inputs, 20) for forms in ((read_fused, write_fused), (read_naive, write_naive)))
    for mine, twin in zip(got, expected, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, twin, rtol=1e-3, atol=1e-4)


def test_what_is_read_and_never_written_has_a_gradient() -> None:
    streams, _, *parameters = leaves((2, 5, 3, 8), torch.float32)
    wanted = [streams, *parameters]
    got, expected = (
        torch.autograd.grad(read(streams, *parameters, 20, 1e-6)[0].square().sum(), wanted, materialize_grads=True)
        for read in (read_fused, read_naive)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_bits_repeat() -> None:
    inputs = leaves((2, 100 if DEVICE.type == "cuda" else 9, 4, 24), torch.float32)  # the interpreter runs in order
    first, second = (both_ways(read_fused, write_fused, inputs, 20) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_streams_that_are_one_branch_expanded_and_output_of_another_type() -> None:
    streams, output, *parameters = leaves((2, 3, 4, 16), torch.float32)
    wide = streams[:, :, :1].expand(-1, -1, 4, -1)
    got, h_res, h_post, through = read_fused(wide, *parameters, 20, 1e-6)
    expected = read_naive(wide, *parameters, 20, 1e-6)
    torch.testing.assert_close((got, h_res, h_post), expected)
    assert torch.equal(through, wide)
    short = output.bfloat16()
    written = write_fused(wide, short, h_res, h_post)
    torch.testing.assert_close(written, write_naive(wide, short, *expected[1:]))
    (grad,) = torch.autograd.grad(written.sum(), short)
    (twin,) = torch.autograd.grad(write_naive(wide, short, *expected[1:]).sum(), short)
    torch.testing.assert_close(grad, twin, rtol=2**-7, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_traced_whole_and_recomputed(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """One graph without breaks, with the gradients of the eager call."""
    monkeypatch.undo()  # a tracer takes no poison
    monkeypatch.setattr(HyperConnection, "_fused", lambda self, streams: True)
    hyper = HyperConnection(3, 8, 1, 5, 1e-6).to(DEVICE)
    for parameter in hyper.parameters():
        torch.nn.init.normal_(parameter)

    def step(x: Tensor) -> Tensor:
        read, mixing = hyper.read(x)
        return hyper.write(x, read.tanh(), mixing)

    def run(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False) if recompute else step(x)

    x = torch.randn(2, 5, 3, 8, device=DEVICE).requires_grad_()
    wanted = [x, *hyper.parameters()]
    eager = torch.autograd.grad(run(x).square().sum(), wanted)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    got = torch.autograd.grad(compiled(x).square().sum(), wanted)
    torch.testing.assert_close(got, eager)
