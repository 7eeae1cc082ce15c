"""Norm and rotation of heads against their twin: through Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from torch_engram.models import attention as module
from torch_engram.models.attention import Attention
from torch_engram.models.config import DecoderConfig
from torch_engram.models.layout import find_places, lay_out
from torch_engram.models.rotary import turn_naive
from torch_engram.models.rotary_fused import _turn, _turn_backward, turn_fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [  # B, T, heads, key heads, width of a head
    (1, 1, 1, 1, 2), (2, 5, 4, 2, 6), (3, 33, 3, 1, 16), (2, 70, 2, 2, 64), (1, 9, 2, 1, 70), (1, 11, 1, 1, 256),
    (5, 1, 8, 2, 8), (0, 3, 2, 1, 8), (2, 0, 2, 1, 8),
]  # fmt: skip
EPS = 1e-5


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is not a number."""
    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        real = getattr(owner, name)

        def poison(*args: object, real: Callable[..., Tensor] = real, **options: object) -> Tensor:
            return real(*args, **options).fill_(torch.nan)

        monkeypatch.setattr(owner, name, poison)


def leaves(size: tuple[int, ...], dtype: torch.dtype, angles: int) -> tuple[list[Tensor], list[Tensor]]:
    """``qkv`` and both scales, which have gradients, and the rotations of ``angles`` sequences."""
    batch, tokens, heads, groups, width = size
    made = (torch.randn(batch, tokens, (heads + 2 * groups) * width).to(dtype), torch.randn(width), torch.randn(width))
    angle = torch.randn(angles, tokens, 1, width // 2, device=DEVICE)
    return [tensor.to(DEVICE).requires_grad_() for tensor in made], [angle.cos(), angle.sin()]


def both_ways(function: Callable, inputs: list[Tensor], angles: list[Tensor], heads: int, laid: str) -> list[Tensor]:
    """Query, key and value, then the gradients, where those of the results lie in memory in some order."""
    results = function(*inputs, *angles, heads, EPS)
    torch.manual_seed(1)
    grads = [torch.randn(result.shape).to(result) for result in results]
    if laid == "transposed":
        grads = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads]
    elif laid == "last":
        grads = [grad.transpose(2, 3).contiguous().transpose(2, 3) for grad in grads]
    return [*results, *torch.autograd.grad(results, inputs, grads)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dtype", "laid", "shared"),
    [
        (torch.float32, "contiguous", True), (torch.float32, "transposed", False), (torch.float32, "last", False),
        (torch.bfloat16, "transposed", False),
    ],
)  # fmt: skip
def test_equals_the_twin(size: tuple[int, ...], dtype: torch.dtype, shared: bool, laid: str, poisoned: None) -> None:
    """In bf16 within one rounding of the twin in fp32, to which every head is as large as its scale."""
    inputs, angles = leaves(size, dtype, 1 if shared else size[0])
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = both_ways(turn_naive, exact, angles, size[2], laid)
    got = both_ways(turn_fused, inputs, angles, size[2], laid)
    # The interpreter cuts bf16 off, the kernel on a GPU rounds; the gradients that come in are rounded here, too.
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=2**-7, atol=2**-7)
    for number, (mine, twin) in enumerate(zip(got, expected, strict=True)):
        assert mine.dtype == (dtype if number < 4 else torch.float32) and mine.shape == twin.shape
        scale = twin.abs().max().clamp_min(1.0) if twin.numel() else 1.0
        torch.testing.assert_close(mine.float() / scale, twin / scale, msg=lambda m, n=number: f"{n}: {m}", **close)


def test_values_are_a_view_and_strided_inputs_are_taken() -> None:
    (qkv, *scales), angles = leaves((2, 5, 4, 2, 8), torch.float32, 2)
    value = turn_fused(qkv, *scales, *angles, 4, EPS)[2]
    assert value.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    wide = qkv.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    turned = [angle.expand(2, -1, -1, -1) for angle in leaves((2, 5, 4, 2, 8), torch.float32, 1)[1]]
    for got, expected in zip(
        both_ways(turn_fused, [wide, *scales], turned, 4, "contiguous"),
        both_ways(turn_naive, [wide, *scales], turned, 4, "contiguous"),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_bits_repeat_and_results_may_go_unused() -> None:
    inputs, angles = leaves((3, 70 if DEVICE.type == "cuda" else 9, 4, 2, 64), torch.float32, 3)
    first, second = (both_ways(turn_fused, inputs, angles, 4, "transposed") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    got, expected = (
        torch.autograd.grad(function(*inputs, *angles, 4, EPS)[1].sum(), inputs)
        for function in (turn_fused, turn_naive)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_operators_say_their_shapes_right() -> None:
    inputs, angles = leaves((2, 5, 4, 2, 6), torch.float32, 2)
    plain = [x.detach() for x in inputs]
    torch.library.opcheck(_turn, (*plain, *angles, 4, EPS))
    grads = [torch.randn(2, 5, heads, 6, device=DEVICE) for heads in (4, 2, 2)]
    torch.library.opcheck(_turn_backward, (*grads, *plain, *angles, EPS))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_traced_whole_and_recomputed(monkeypatch: pytest.MonkeyPatch, autocast: bool, recompute: bool) -> None:
    """One graph without breaks, with the gradients of the eager call and of the other devices' path."""
    config = DecoderConfig(vocab_size=8, hidden=32, layers=1, heads=4, kv_heads=2, head_dim=12, ffn_hidden=8)
    attention = Attention(config).to(DEVICE)
    tokens = torch.zeros(2, 9, dtype=torch.long, device=DEVICE)
    layout = lay_out(find_places(tokens, None, None, None), 9, 12, 1e4, torch.float32)
    x = torch.randn(2, 9, 32, device=DEVICE).requires_grad_()
    wanted = [x, *attention.parameters()]

    def run(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            again = partial(torch.utils.checkpoint.checkpoint, attention, use_reentrant=False)
            y = (again if recompute else attention)(x, layout)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        return y.float().square().sum()

    monkeypatch.setattr(module, "turn", turn_naive)
    plain = torch.autograd.grad(run(x), wanted)
    monkeypatch.setattr(module, "turn", turn_fused)
    eager = torch.autograd.grad(run(x), wanted)
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)(x), wanted)
    for a, b, c in zip(plain, eager, got, strict=True):
        assert max((a - b).norm(), (b - c).norm()) <= (2**-6 if autocast else 1e-5) * a.norm()
