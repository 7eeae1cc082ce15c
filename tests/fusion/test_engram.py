"""What the Engram module promises: documents, chunks, dead tokens, zero rows, rounding, compile, recompute, state."""

from __future__ import annotations

import itertools
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_engram.config import FUSIONS, EngramConfig
from torch_engram.fusion import STYLES, Engram

CLOSE: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)


def make(**fields: Any) -> Engram:
    """An Engram whose parameters are all away from their start."""
    config = EngramConfig(**{**dict(layers=(0,), hidden=8, vocab_size=50, heads=1, row_dim=5, branches=2), **fields})
    engram = Engram(config)
    for parameter in engram.parameters():
        torch.nn.init.normal_(parameter, mean=0.2, std=0.5)
    return engram


def inputs(engram: Engram, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    config = engram.config
    return torch.randn(batch, tokens, config.branches, config.hidden), torch.randn(batch, tokens, config.embedding_dim)


def test_every_configured_style_exists() -> None:
    assert set(STYLES) == set(FUSIONS)


@settings(max_examples=60, deadline=None)
@given(
    fusion=st.sampled_from(FUSIONS), branches=st.integers(1, 4), hidden=st.integers(1, 9), row_dim=st.integers(1, 7),
    taps=st.sampled_from((0, 2, 3, 4)), order=st.integers(2, 4), tokens=st.integers(1, 25), seed=st.integers(0, 999),
    cuts=st.sets(st.integers(1, 24)), starts=st.sets(st.integers(0, 24)), dead=st.integers(0, 5),
    drafts=st.integers(0, 3),
)  # fmt: skip
@torch.no_grad()
def test_any_chunking_gives_the_same(
    fusion: str, branches: int, hidden: int, row_dim: int, taps: int, order: int, tokens: int, seed: int,
    cuts: set[int], starts: set[int], dead: int, drafts: int,
) -> None:  # fmt: skip
    """Every chunk is fed with ``drafts`` wrong positions behind it, which are then taken back."""
    torch.manual_seed(seed)
    engram = make(fusion=fusion, branches=branches, hidden=hidden, row_dim=row_dim, conv_kernel=taps, max_ngram=order)
    streams, embeddings = inputs(engram, 2, tokens)
    doc_start = torch.zeros(2, tokens, dtype=torch.bool)
    doc_start[0, [s for s in starts if s < tokens]] = True
    live = torch.ones(2, tokens, dtype=torch.bool)
    live[1, :dead] = False
    whole, gates = engram(streams, embeddings, doc_start=doc_start, live=live, return_gates=True)
    assert gates.shape == (2, tokens, branches) and gates.dtype == torch.float32
    state = engram.new_state(drafts)
    edges = [0, *sorted(c for c in cuts if c < tokens), tokens]
    for a, b in itertools.pairwise(edges):
        wrong = inputs(engram, 2, drafts)
        part = engram(
            torch.cat((streams[:, a:b], wrong[0]), 1), torch.cat((embeddings[:, a:b], wrong[1]), 1),
            doc_start=torch.nn.functional.pad(doc_start[:, a:b], (0, drafts), value=True),
            live=torch.nn.functional.pad(live[:, a:b], (0, drafts), value=True), state=state,
        )  # fmt: skip
        state.crop(drafts)
        torch.testing.assert_close(part[:, : b - a], whole[:, a:b], **CLOSE)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("fusion", ["paper", "qwen-ple"])
@torch.no_grad()
def test_a_prefill_by_kernels_leaves_the_same_state(fusion: str, tokens: int) -> None:
    engram = make(fusion=fusion)
    streams, embeddings = inputs(engram, 2, tokens)
    starts, live = torch.rand(2, tokens) < 0.2, torch.rand(2, tokens) < 0.8
    expected, state = engram.new_state(4), engram.new_state(4)
    keys_value = engram.wkv(embeddings)
    _, alpha = engram.fuse_naive(streams, keys_value, live, starts, expected)
    engram._remember(keys_value, alpha, streams.dtype, starts, state)
    for drop in (0, 3):
        expected.crop(drop)
        state.crop(drop)
        for mine, theirs in zip(state.last(), expected.last(), strict=True):
            torch.testing.assert_close(mine, theirs)
    if tokens == 40:
        with pytest.raises(ValueError, match="raise drafts"):
            state.crop(2)


@pytest.mark.gpu
@torch.no_grad()
def test_a_prefill_on_a_gpu_goes_on_as_the_whole() -> None:
    engram = make(hidden=32).cuda()
    streams, embeddings = (given.cuda() for given in inputs(engram.cpu(), 2, 30))
    engram.cuda()
    whole, state = engram(streams, embeddings), engram.new_state()
    parts = [engram(streams[:, a:b], embeddings[:, a:b], state=state) for a, b in ((0, 20), (20, 21), (21, 30))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fusion", ["paper", "deepseek-v4.1"])
@torch.no_grad()
def test_packed_documents_equal_the_same_alone(fusion: str) -> None:
    engram = make(fusion=fusion)
    streams, embeddings = inputs(engram, 1, 20)
    doc_start = torch.zeros(1, 20, dtype=torch.bool)
    doc_start[0, [0, 3, 4, 15]] = True
    packed = engram(streams, embeddings, doc_start=doc_start)
    for a, b in [(0, 3), (3, 4), (4, 15), (15, 20)]:
        torch.testing.assert_close(packed[:, a:b], engram(streams[:, a:b], embeddings[:, a:b]), **CLOSE)
    assert not torch.allclose(packed, engram(streams, embeddings))  # the test would not see a convolution of zeros


@torch.no_grad()
def test_qwen_convolution_crosses_documents() -> None:
    engram = make(fusion="qwen-ple")
    streams, embeddings = inputs(engram, 1, 20)
    torch.testing.assert_close(
        engram(streams, embeddings, doc_start=torch.ones(1, 20, dtype=torch.bool)), engram(streams, embeddings)
    )


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_left_padding_is_as_if_absent(fusion: str) -> None:
    engram = make(fusion=fusion, bias=True)
    streams, embeddings = inputs(engram, 1, 12)
    live = torch.arange(12)[None] >= 5
    padded, gates = engram(streams, embeddings, live=live, return_gates=True)
    torch.testing.assert_close(padded[:, 5:], engram(streams[:, 5:], embeddings[:, 5:]), **CLOSE)
    assert torch.equal(padded[:, :5], streams[:, :5]) and (gates[:, :5] == 0).all()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_rows_add_nothing_yet_learn(fusion: str, dtype: torch.dtype) -> None:
    engram = make(fusion=fusion).to(dtype)
    streams, embeddings = inputs(engram, 2, 9)
    streams, embeddings = streams.to(dtype), torch.zeros_like(embeddings, dtype=dtype, requires_grad=True)
    out = engram(streams, embeddings)
    assert torch.equal(out, streams)
    out.float().sum().backward()
    assert embeddings.grad is not None and embeddings.grad.isfinite().all() and (embeddings.grad != 0).any(-1).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in engram.parameters())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fresh_module_adds_the_gated_value_and_trains_its_convolution(fusion: str) -> None:
    engram = Engram(make(fusion=fusion).config)
    streams, embeddings = inputs(engram, 2, 15)
    out, gates = engram(streams, embeddings, return_gates=True)
    value = engram.wkv(embeddings)[..., None, -8:]
    torch.testing.assert_close(out, streams + gates[..., None] * value, **CLOSE)
    out.square().sum().backward()
    assert engram.convolution is not None and engram.convolution.weight.grad is not None
    assert (engram.convolution.weight.grad != 0).all()


def test_repeat_and_select_follow_the_sequences() -> None:
    engram = make()
    streams, embeddings = inputs(engram, 3, 12)
    state = engram.new_state()
    engram(streams[:, :10], embeddings[:, :10], state=state)
    state.repeat(2)
    state.select(torch.tensor([5, 0, 0, 2]))  # of sequences 0 0 1 1 2 2
    rows = torch.tensor([2, 0, 0, 1])
    got = engram(streams[rows, 10:], embeddings[rows, 10:], state=state)
    torch.testing.assert_close(got, engram(streams, embeddings)[rows, 10:], **CLOSE)
    state.reset()
    torch.testing.assert_close(engram(streams, embeddings, state=state), engram(streams, embeddings), **CLOSE)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_bf16_is_near_fp32_and_rounds_once(fusion: str) -> None:
    engram = make(fusion=fusion, hidden=32)
    streams, embeddings = inputs(engram, 2, 9)
    exact = engram(streams.bfloat16().float(), embeddings.bfloat16().float())
    got = engram.bfloat16()(streams.bfloat16(), embeddings.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.1)


def test_rows_of_another_type_are_read_in_the_weights_own() -> None:
    """A bank that served a training under autocast gives bf16; the same decoder then runs without autocast."""
    engram = make(hidden=32)
    streams, embeddings = inputs(engram, 2, 9)
    rounded = embeddings.bfloat16()
    assert torch.equal(engram(streams, rounded), engram(streams, rounded.float()))


def test_autocast_keeps_the_streams_dtype() -> None:
    engram = make(hidden=32)
    streams, embeddings = inputs(engram, 2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, gates = engram(streams, embeddings, return_gates=True)
    assert got.dtype == gates.dtype == torch.float32
    torch.testing.assert_close(got, engram(streams, embeddings), rtol=0.05, atol=0.05)


def grads(engram: Engram, run: Any, streams: Tensor, embeddings: Tensor) -> list[Tensor]:
    engram.zero_grad()
    streams, embeddings = streams.clone().requires_grad_(), embeddings.clone().requires_grad_()
    run(streams, embeddings).square().sum().backward()
    found = [streams.grad, embeddings.grad, *(p.grad for p in engram.parameters())]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]


def test_recompute_gives_the_same_gradients_bit_for_bit() -> None:
    engram = make()
    streams, embeddings = inputs(engram, 2, 9)
    doc_start = torch.rand(2, 9) < 0.3
    plain = grads(engram, lambda s, e: engram(s, e, doc_start=doc_start), streams, embeddings)
    again = grads(
        engram, lambda s, e: checkpoint(engram, s, e, doc_start=doc_start, use_reentrant=False), streams, embeddings
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_two_forwards_before_a_backward() -> None:
    engram = make()
    first, second = inputs(engram, 2, 9), inputs(engram, 2, 9)
    one, two = (grads(engram, engram, *pair) for pair in (first, second))
    engram.zero_grad()
    a, b = engram(*first), engram(*second)
    (a.square().sum() + b.square().sum()).backward()
    for parameter, x, y in zip(engram.parameters(), one[2:], two[2:], strict=True):
        torch.testing.assert_close(parameter.grad, x + y, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("gcc") is None, reason="needs a C++ compiler")
def test_compiles_without_a_break() -> None:
    engram = make()
    compiled = torch.compile(engram, fullgraph=True, dynamic=False)
    streams, embeddings = inputs(engram, 2, 9)
    masks = dict(doc_start=torch.rand(2, 9) < 0.3, live=torch.rand(2, 9) < 0.8)
    eager = grads(engram, lambda s, e: engram(s, e, **masks), streams, embeddings)
    fast = grads(engram, lambda s, e: compiled(s, e, **masks), streams, embeddings)
    for a, b in zip(eager, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_finite_differences() -> None:
    engram = make(hidden=3, row_dim=2).double()
    streams, embeddings = inputs(engram, 1, 5)
    doc_start = torch.tensor([[True, False, True, False, False]])
    # The module works in fp32 inside, so the differences are coarse.
    assert torch.autograd.gradcheck(
        lambda s, e: engram(s, e, doc_start=doc_start),
        (streams.double().requires_grad_(), embeddings.double().requires_grad_()),
        eps=1e-2, atol=2e-2, rtol=2e-2, nondet_tol=0.0,
    )  # fmt: skip


def test_shapes_that_do_not_fit_are_named() -> None:
    engram = make()
    streams, embeddings = inputs(engram, 2, 9)
    with pytest.raises(ValueError, match=r"give \[B, T, 2, 8\]"):
        engram(streams[:, :, :1], embeddings)
    with pytest.raises(ValueError, match=r"give \[2, 9, 10\]"):
        engram(streams, embeddings[:, :8])
