"""One row id from every implementation: scalar Python, torch, the released Qwen code, written-out numbers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.addressing import Addressing, CanonicalVocab, hashing, layouts
from torch_engram.addressing.oracle import ngram_at, rows_at
from torch_engram.config import EngramConfig

V41 = EngramConfig.preset("deepseek-v4.1")
BOTH = pytest.mark.parametrize(
    "reduce", [hashing.rows_naive, lambda mix, *constants: hashing.reducer(*constants)(mix)], ids=["naive", "limbs"]
)


def of_canonical_ids(config: EngramConfig) -> Addressing:
    """Addressing whose raw ids are canonical ones already."""
    return Addressing(config, CanonicalVocab(torch.arange(config.vocab_size), "identity"))


def oracle(addressing: Addressing, tokens: Tensor, start: Tensor, live: Tensor, layer: int) -> list[list[list[int]]]:
    """Rows of every position by the scalar code; a scheme's own boundaries are made explicit starts."""
    config, result = addressing.config, []
    for sequence, starts, lives in zip(tokens.tolist(), start.tolist(), live.tolist(), strict=True):
        if config.scheme == "qwen_ple":
            after_eos = [False, *(token == config.pad_id for token in sequence[:-1])]
            starts = [a or b for a, b in zip(starts, after_eos, strict=True)]
        ids = sequence if addressing.vocab is None else addressing.vocab.ids[sequence].tolist()
        dead = [not alive for alive in lives]
        windows = [ngram_at(ids, t, config.max_ngram, addressing.pad, starts, dead) for t in range(len(ids))]
        result.append([rows_at(window, addressing.layouts[layer]) for window in windows])
    return result


@BOTH
@pytest.mark.parametrize("ids, first, last", [
    ([10, 20, 30, 40], [1326936, 22120929, 40011923, 55142539], 378628807),
    ([40], [7957620, 22328225, 38180748, 53003837], 369052152),
])  # fmt: skip
def test_published_vectors_of_deepseek_v41(reduce: Any, ids: list[int], first: list[int], last: int) -> None:
    addressing = of_canonical_ids(V41)
    window = addressing.windows(torch.tensor([ids]))[:, -1:]
    multipliers, offsets, *primes = addressing._layer(1, window.device)
    rows = reduce(hashing.mixes(window, multipliers), tuple(primes), offsets)[0, 0].tolist()
    assert (rows[:4], rows[-1]) == (first, last)
    assert rows == rows_at(ngram_at(ids, len(ids) - 1, 4, 2, [False] * 4, [False] * 4), addressing.layouts[1])


@st.composite
def lookups(draw: st.DrawFn) -> tuple[Addressing, Tensor, Tensor, Tensor]:
    """A random memory and a random batch with document starts and dead tokens."""
    order = draw(st.integers(2, 5))
    scheme = draw(st.sampled_from(["engram", "qwen_ple"]))
    size = st.integers(2, 100) | st.integers(2**14, 2**27)
    by_order = st.lists(st.integers(1, 3), min_size=order - 1, max_size=order - 1)
    sizes = st.lists(size, min_size=order - 1, max_size=order - 1)
    vocab = draw(st.integers(4, 12) | st.just(99_092))
    config = EngramConfig(
        layers=(0, 3), hidden=8, vocab_size=vocab, max_ngram=order, scheme=scheme, seed=draw(st.integers(0, 9)),
        heads=draw(by_order if scheme == "engram" else st.integers(1, 3)),
        rows_per_head=draw(sizes if scheme == "engram" else size), pad_id=draw(st.integers(0, 3)),
    )  # fmt: skip
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ids = torch.cat((torch.arange(vocab), torch.randint(vocab, (5,), generator=generator)))
    addressing = Addressing(config, CanonicalVocab(ids, "drawn") if scheme == "engram" else None)

    def flags(share: float) -> Tensor:
        return torch.rand(batch, length, generator=generator) < share

    tokens = torch.randint(addressing.raw_size, (batch, length), generator=generator)
    tokens[flags(0.2)] = config.pad_id
    return addressing, tokens, flags(draw(st.sampled_from([0, 0.3]))), ~flags(draw(st.sampled_from([0, 0.3])))


@BOTH
@given(lookups(), st.data())
def test_equals_the_scalar_oracle_for_every_chunking(
    reduce: Any, lookup: tuple[Addressing, Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    addressing, tokens, start, live = lookup
    length = tokens.shape[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    history, windows = addressing.new_history(), []
    for first, last in zip([0, *cuts], [*cuts, length], strict=True):
        part = slice(first, last)
        windows.append(
            addressing.windows(tokens[:, part], history=history, doc_start=start[:, part], live=live[:, part])
        )
    window = torch.cat(windows, dim=1)
    assert torch.equal(window, addressing.windows(tokens, doc_start=start, live=live))
    for layer in (0, 3):
        multipliers, offsets, *primes = addressing._layer(layer, window.device)
        mix, rows = addressing.rows(window, layer)
        assert torch.equal(mix, hashing.mixes(window, multipliers))
        assert torch.equal(rows, reduce(mix, tuple(primes), offsets))
        assert rows.tolist() == oracle(addressing, tokens, start, live, layer)


@given(lookups())
def test_packed_documents_equal_the_same_documents_alone(lookup: tuple[Addressing, Tensor, Tensor, Tensor]) -> None:
    addressing, tokens, start, live = lookup
    packed = addressing.windows(tokens, doc_start=start, live=live)
    for b, sequence in enumerate(tokens):
        bounds = [0, *start[b].nonzero().flatten().tolist(), len(sequence)]
        for first, last in itertools.pairwise(bounds):
            if first < last:
                alone = addressing.windows(sequence[None, first:last], live=live[b, None, first:last])
                assert torch.equal(packed[b, first:last], alone[0])


@given(lookups())
def test_padding_on_either_side_changes_no_live_row(lookup: tuple[Addressing, Tensor, Tensor, Tensor]) -> None:
    addressing, tokens, start, live = lookup
    plain = addressing.windows(tokens, doc_start=start, live=live)
    dead = torch.zeros_like(live[:, :1])
    width = (3, 2)

    def padded(body: Tensor, edge: Tensor) -> Tensor:
        return torch.cat((edge.expand(-1, width[0]), body, edge.expand(-1, width[1])), dim=1)

    windows = addressing.windows(padded(tokens, tokens[:, :1]), doc_start=padded(start, dead), live=padded(live, dead))
    assert torch.equal(windows[:, 3:-2], plain)
    assert bool((windows[:, :3] == addressing.pad).all())


def test_rows_past_two_to_the_31st() -> None:
    config = EngramConfig(layers=(1,), hidden=8, vocab_size=99_092, heads=8, rows_per_head=200_000_000, row_dim=1)
    addressing = of_canonical_ids(config)
    tokens = torch.randint(99_092, (2, 9))
    rows = addressing.rows(addressing.windows(tokens), 1)[1]
    assert rows.max() > 2**31
    assert rows.tolist() == oracle(addressing, tokens, torch.zeros_like(tokens), torch.ones_like(tokens), 1)


def test_devices_agree(device: torch.device) -> None:
    addressing = of_canonical_ids(V41)
    tokens, start, live = torch.randint(99_092, (2, 300)), torch.rand(2, 300) < 0.1, torch.rand(2, 300) > 0.1
    here = addressing.windows(tokens, doc_start=start, live=live)
    there = addressing.windows(tokens.to(device), doc_start=start.to(device), live=live.to(device))
    assert torch.equal(there.cpu(), here)
    for mine, theirs in zip(addressing.rows(here, 14), addressing.rows(there, 14), strict=True):
        assert torch.equal(theirs.cpu(), mine)


# -- the released Qwen code ------------------------------------------------------------------------------------------

EOS = 7


@pytest.fixture(scope="module")
def released() -> Any:
    modeling = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    config = Qwen4ExpTextConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, layer_types=["linear_attention"] * 4, ple_layer_ids=[2, 4],
        ple_embed_dim=24, heads_per_ngram=2, ngram_size=3, ngram_vocab_size_base=100, eos_token_id=EOS, num_experts=4,
        num_experts_per_tok=2, make_ngram_vocab_size_divisible_by=128,
    )  # fmt: skip
    embeddings = [modeling.Qwen4ExpTextNGramEmbedding(config, 24, index, i) for i, index in enumerate((1, 3))]
    for embedding in embeddings:  # one number a row: an embedding then reads as the row's id
        rows = embedding.total_vocab_size
        embedding.ngram_embedding = torch.nn.Embedding(rows, 1).double()
        with torch.no_grad():
            embedding.ngram_embedding.weight.copy_(torch.arange(rows)[:, None])
    return config, embeddings


@pytest.fixture
def qwen(released: Any) -> Addressing:
    config = EngramConfig.preset(
        "qwen-ple", layers=(1, 3), vocab_size=50, heads=2, rows_per_head=100, pad_id=EOS, seed=released[0].seed
    )
    return Addressing(config)


def test_equals_the_released_qwen_code(released: Any, qwen: Addressing) -> None:
    tokens = torch.randint(50, (4, 40))
    tokens[torch.rand(4, 40) < 0.15] = EOS
    for layer, embedding in zip((1, 3), released[1], strict=True):
        layout = qwen.layouts[layer]
        assert list(layout.flat_primes) == embedding.head_vocab_sizes
        assert list(layout.multipliers) == embedding.layer_multipliers.tolist()
        assert torch.equal(qwen.rows(qwen.windows(tokens), layer)[1].double(), embedding(tokens, None).detach())


def test_equals_the_released_qwen_code_in_cached_decoding(released: Any, qwen: Addressing) -> None:
    from transformers import DynamicCache

    tokens = torch.randint(50, (2, 12))
    tokens[:, 3] = tokens[1, 7] = EOS
    cache, history = DynamicCache(config=released[0]), qwen.new_history()
    for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:7], tokens[:, 7:8], tokens[:, 8:9], tokens[:, 9:12]):
        rows = qwen.rows(qwen.windows(part, history=history), 1)[1]
        assert torch.equal(rows.double(), released[1][0](part, cache).detach())


# -- known divergences in the field ----------------------------------------------------------------------------------


def test_multipliers_come_from_numpys_generator() -> None:
    half = (2**63 - 1) // V41.vocab_size // 2
    for layer, layout in layouts(V41).items():
        drawn = np.random.default_rng(10_007 * layer).integers(0, half, size=4, dtype=np.int64)
        assert layout.multipliers == tuple(int(value) * 2 + 1 for value in drawn)


def test_multipliers_are_not_narrowed_to_32_bits() -> None:
    addressing = of_canonical_ids(V41)
    mix, rows = addressing.rows(addressing.windows(torch.randint(99_092, (1, 200))), 1)
    assert bool((mix.amax(dim=(0, 1)) > 2**60).all())  # every order keeps a wide mix
    narrow = torch.tensor(addressing.layouts[1].multipliers).to(torch.int32).long()
    _, offsets, *primes = addressing._layer(1, mix.device)
    window = addressing.windows(torch.randint(99_092, (1, 200)))
    assert not torch.equal(rows, hashing.rows_naive(hashing.mixes(window, narrow).abs(), tuple(primes), offsets))


def test_no_ngram_reaches_across_a_document_start() -> None:
    addressing = of_canonical_ids(V41)
    tokens = torch.randint(99_092, (1, 8))
    start = torch.zeros(1, 8, dtype=torch.bool)
    start[0, 4] = True
    packed = addressing.windows(tokens, doc_start=start)
    assert packed[0, 5].tolist() == [tokens[0, 5], tokens[0, 4], 2, 2]
    assert not torch.equal(packed, addressing.windows(tokens))
