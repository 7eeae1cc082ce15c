"""The projection in FP8: what its blocks hold, its kernels against their twins, how far it is from the plain product,
and what an Engram, a decoder and a run do with it. Kernels run through the interpreter on a CPU, else compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_engram.config import EngramConfig
from torch_engram.fusion import Engram, fp8, fp8_linear, require_fp8
from torch_engram.fusion.fp8 import Blocks, dequantise, product_naive, quantise_naive
from torch_engram.models import Decoder, DecoderConfig

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CLOSE = 0.05
"""Of two E4M3 operands, each within 2**-4 of its numbers; what a sum of products of random signs is off by, at most."""

if ON_GPU and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("needs a GPU with FP8 products", allow_module_level=True)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels on a CPU, too, and what they leave unwritten is wrong."""
    real = Tensor.new_empty

    def poison(*args: Any, **options: Any) -> Tensor:
        made = real(*args, **options)
        # Codes are filled as the bytes that they are, for they are viewed so.
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(0x7F)

    monkeypatch.setattr(Tensor, "new_empty", poison)
    monkeypatch.setattr(fp8, "use_kernels", lambda x: True)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers of many sizes, a few of them far larger than the rest, and blocks of zeros where there is room."""
    x = torch.randn(shape) * torch.randn(shape[0], 1).mul(3).exp2()
    x[torch.rand(shape) < 0.002] *= 300
    x[1:3] = 0
    x[:, 128:256] = 0
    return x.to(DEVICE, dtype)


def off(mine: Tensor, exact: Tensor) -> float:
    """Error as a share of the size."""
    mine, exact = mine.detach().double(), exact.detach().double()
    return float((mine - exact).norm() / exact.norm().clamp_min(1e-30))


def same(mine: Blocks, twin: Blocks) -> None:
    assert mine.codes.dtype == torch.float8_e4m3fn and mine.scales.dtype == torch.float32
    torch.testing.assert_close(mine.scales, twin.scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mine.codes.float(), twin.codes.float(), rtol=0, atol=0, equal_nan=True)


def test_a_block_is_what_the_formula_says() -> None:
    x = torch.zeros(2, 130)
    x[0, :6] = torch.tensor([448.0, 1.0, 1.0625, 1.1875, 2.0**-9, 2.0**-10])  # ties go to even, down and up
    x[0, 129], x[1, 0] = 7e-3, -torch.finfo(torch.float32).tiny
    (blocks,) = quantise_naive(x)
    assert blocks.codes.shape == (128, 256) and blocks.scales.shape == (2, 128)
    assert blocks.codes[0, :6].tolist() == [448.0, 1.0, 1.0, 1.25, 2.0**-9, 0.0]
    assert blocks.scales[:, 0].tolist() == [1.0, torch.tensor(7e-3).div(448).item()] and blocks.codes[0, 129] == 448
    assert blocks.codes[1:].float().abs().max() == 0 and blocks.scales.min() > 0
    (square,) = quantise_naive(x, square=True)
    assert square.codes.shape == (128, 256) and square.scales.shape == (2, 1)
    assert dequantise(square)[0, :6].tolist() == blocks.codes[0, :6].tolist()


@settings(max_examples=15)
@given(st.integers(0, 300), st.integers(1, 300), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
@example(rows=1, columns=24, square=False, both=True, half=True, seed=0)
@example(rows=257, columns=129, square=True, both=True, half=False, seed=0)
def test_quantised_bit_for_bit(rows: int, columns: int, square: bool, both: bool, half: bool, seed: int) -> None:
    from torch_engram.fusion.fp8_kernels import quantise_triton

    torch.manual_seed(seed)
    x = numbers(rows, columns, dtype=torch.bfloat16 if half else torch.float32) if rows else torch.empty(0, columns)
    ways = dict(rows=both or seed % 2 == 0, columns=both or seed % 2 == 1, square=square)
    mine, twin = quantise_triton(x.to(DEVICE), **ways), quantise_naive(x.to(DEVICE), **ways)
    assert len(mine) == len(twin) == 1 + both
    for one, other in zip(mine, twin, strict=True):
        same(one, other)


def test_every_code_is_rounded_as_pytorch_rounds() -> None:
    """All codes, the midpoints between them, and what lies just beside either."""
    from torch_engram.fusion.fp8_kernels import quantise_triton

    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat((codes, (codes[1:] + codes[:-1]) / 2))
    points = torch.cat((points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(448.0))))
    x = F.pad(torch.cat((points, -points)), (0, -2 * len(points) % 127)).view(-1, 127)
    x = F.pad(x, (1, 0), value=448.0).to(DEVICE)  # so that each scale is 1
    same(quantise_triton(x)[0], quantise_naive(x)[0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_visible(square: bool, value: float) -> None:
    from torch_engram.fusion.fp8_kernels import product_triton, quantise_triton

    x = torch.randn(140, 200, device=DEVICE)
    x[130, 150] = value
    (mine,), (twin,) = quantise_triton(x, square=square), quantise_naive(x, square=square)
    same(mine, twin)
    (other,) = quantise_naive(torch.randn(20, 200, device=DEVICE))
    for product, blocks in ((product_triton, mine), (product_naive, twin)):
        y = product(other, blocks, (20, 140), torch.float32)
        assert not y[:, 130].isfinite().any() and y[:, :128].isfinite().all()


SIZES = [(0, 8, 16), (1, 24, 16), (3, 8, 24), (130, 300, 129), (257, 128, 40)]


def derivatives(form: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    y = form(*leaves)
    assert y.dtype == x.dtype
    return [y, *torch.autograd.grad(y, leaves, grad.to(y))]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("types", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_kernels_equal_the_twin(
    size: tuple[int, ...], types: tuple[torch.dtype, ...], request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    tokens, wide, out = size
    x, weight = numbers(tokens, wide, dtype=types[0]), numbers(out, wide, dtype=types[1])
    grad = numbers(tokens, out, dtype=types[0])
    with monkeypatch.context() as patch:
        patch.setattr(fp8, "use_kernels", lambda x: False)
        twin = derivatives(fp8_linear, x, weight, grad)
    request.getfixturevalue("kernels")
    mine = derivatives(fp8_linear, x, weight, grad)
    for one, other, dtype in zip(mine, twin, (types[0], types[0], types[1]), strict=True):
        assert one.dtype == other.dtype == dtype and one.shape == other.shape
        # fp32: the order of the sums, and on Hopper the rounding of cuBLAS's to bf16; bf16: one rounding.
        assert off(one, other) < (2**-7 if dtype == torch.bfloat16 else 5e-3 if ON_GPU else 1e-5)


@pytest.mark.parametrize("size", [(200, 300, 160), (1, 24, 40)])
def test_near_the_plain_product(size: tuple[int, ...]) -> None:
    """Within ``CLOSE`` as a share of the size, outliers and all, as blocks keep them to themselves."""
    tokens, wide, out = size
    x, weight, grad = numbers(tokens, wide), torch.randn(out, wide, device=DEVICE), numbers(tokens, out)
    plain, mine = (derivatives(form, x, weight, grad) for form in (F.linear, fp8_linear))
    for one, other in zip(mine, plain, strict=True):
        assert off(one, other) < CLOSE


def test_widths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has 9 numbers a token, and the weight takes 8: give \[..., 8\]"):
        fp8_linear(torch.randn(3, 9), torch.randn(16, 8))


def test_only_what_is_wanted_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(5, 8, device=DEVICE), torch.randn(16, 8, device=DEVICE)
    whole = derivatives(fp8_linear, x, weight, torch.ones(5, 16))
    for frozen, of in ((weight, x), (x, weight)):
        leaf = of.clone().requires_grad_()
        y = fp8_linear(leaf, frozen) if of is x else fp8_linear(frozen, leaf)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert torch.equal(grad, whole[1 if of is x else 2])


def make(bias: bool = False, **options: Any) -> Engram:
    torch.manual_seed(1)
    config = EngramConfig(layers=(0,), hidden=24, vocab_size=50, heads=2, row_dim=35, branches=2, bias=bias)
    engram = Engram(config, **options).to(DEVICE)
    for parameter in engram.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return engram


def agreeing(engram: Engram, tokens: int) -> tuple[Tensor, Tensor]:
    """Streams near the keys, and embeddings: gates far from the signed root's kink, where slopes are infinite."""
    embeddings = torch.randn(2, tokens, 140, device=DEVICE)
    with torch.no_grad():
        keys = engram.wkv(embeddings)[..., :48].unflatten(-1, (2, 24))
    sign = (engram.query_weight * engram.key_weight).sign().detach()
    streams = keys * sign + 0.3 * torch.randn_like(keys)
    return streams.requires_grad_(), embeddings.requires_grad_()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_an_engram_is_near_the_one_without(bias: bool, autocast: bool) -> None:
    streams, embeddings = agreeing(make(bias), 40)
    found = []
    for option in (False, True):
        engram = make(bias, fp8=option)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            added = engram(streams, embeddings) - streams
        wanted = [streams, embeddings, *engram.parameters()]
        found.append([added, *torch.autograd.grad(added.square().sum(), wanted)])
    for plain, mine in zip(*found, strict=True):
        assert plain.dtype == mine.dtype and off(mine, plain) < 2 * CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_is_that_of_a_linear_map(dtype: torch.dtype) -> None:
    engram = make(fp8=True).to(dtype)
    streams, embeddings = torch.randn(1, 3, 2, 24, device=DEVICE), torch.randn(1, 3, 140, device=DEVICE)
    assert engram(streams.to(dtype), embeddings).dtype == dtype
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            x = embeddings.to(dtype)
            assert fp8_linear(x, engram.wkv.weight).dtype == F.linear(x, engram.wkv.weight).dtype


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_traced_whole_and_recomputed(recompute: bool, autocast: bool) -> None:
    engram = make(fp8=True)
    streams, embeddings = agreeing(engram, 9)
    wanted = [streams, embeddings, *engram.parameters()]

    def run(streams: Tensor, embeddings: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            if recompute:
                y = checkpoint(engram, streams, embeddings, use_reentrant=False)
            else:
                y = engram(streams, embeddings)
        return y.float().square().sum()

    eager = torch.autograd.grad(run(streams, embeddings), wanted)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    for mine, theirs in zip(torch.autograd.grad(compiled(streams, embeddings), wanted), eager, strict=True):
        assert off(mine, theirs) < (0.03 if autocast else 1e-4)
    if recompute:
        recompute = False
        plain = torch.autograd.grad(run(streams, embeddings), wanted)
        assert all(torch.equal(one, other) for one, other in zip(eager, plain, strict=True))


class Rows:
    """Trainable embeddings of token and layer, as a bank would hand them over."""

    def __init__(self, table: Tensor, tokens: Tensor):
        self.table, self.tokens = table, tokens

    def wait(self, layer: int) -> dict[str, Tensor]:
        return {"engram": self.table[self.tokens]} if layer == 1 else {}


def test_a_decoder_learns_as_well_with_it() -> None:
    engram = EngramConfig(layers=(1,), hidden=16, vocab_size=40, heads=2, row_dim=4, rows_per_head=50)
    config = DecoderConfig(vocab_size=40, hidden=16, layers=2, heads=2, ffn_hidden=16, engrams={"engram": engram})
    tokens = torch.randint(40, (4, 17))
    losses = {}
    for option in (False, True):
        torch.manual_seed(2)
        decoder = Decoder(config, fp8=option)
        table = (torch.randn(40, engram.embedding_dim) * 0.5).requires_grad_()
        optimizer = torch.optim.Adam([table, *decoder.parameters()], lr=1e-2)
        losses[option] = []
        for _ in range(30):
            logits = decoder(tokens[:, :-1], Rows(table, tokens[:, :-1]))
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[option].append(loss.item())
    assert losses[True] != losses[False] and losses[True][-1] < 0.7 * losses[True][0]
    torch.testing.assert_close(losses[True], losses[False], rtol=0.05, atol=0.02)


def test_it_is_switched_on_and_off_and_is_no_state() -> None:
    engram = EngramConfig(layers=(0, 1), hidden=16, vocab_size=40, heads=2, row_dim=4, rows_per_head=50)
    config = DecoderConfig(vocab_size=40, hidden=16, layers=2, heads=2, ffn_hidden=16, engrams={"engram": engram})
    plain, other = Decoder(config), Decoder(config, fp8=True)
    assert [block.engrams["engram"].fp8 for block in other.blocks] == [True, True] and not plain.fp8
    plain.load_state_dict(other.state_dict())
    plain.fp8, other.fp8 = True, False
    assert plain.blocks[1].engrams["engram"].fp8 and not other.blocks[1].engrams["engram"].fp8


def test_a_gpu_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_fp8("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(ValueError, match=r"8\.9 or more, and an A100 has 8\.0: set fp8=false"):
        require_fp8("cuda")
