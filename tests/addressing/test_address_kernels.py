"""The kernel that finds all layers' rows at once, against windows and hashes: interpreted on a CPU or compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.addressing import Addressing, CanonicalVocab, address_kernels
from torch_engram.addressing.address_kernels import Hashes, address_triton
from torch_engram.config import EngramConfig
from torch_engram.memory import MemoryBank, Tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = (0, 3)
Batch = tuple[Addressing, Tensor, Tensor | None, Tensor | None]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel leaves unwritten shows."""
    new_empty = Tensor.new_empty

    def filled(tensor: Tensor, *shape: int, **options: Any) -> Tensor:
        made = new_empty(tensor, *shape, **options)
        return made.fill_(-(2**60)) if made.dtype == torch.int64 else made

    monkeypatch.setattr(Tensor, "new_empty", filled)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """A random memory and random tokens, perhaps with document starts and dead tokens, on the device."""
    order, scheme = draw(st.integers(2, 4)), draw(st.sampled_from(["engram", "qwen_ple"]))
    size = st.integers(2, 100) | st.sampled_from([2**27, 2**31 + 5, 2**33])
    by_order = st.lists(st.integers(1, 3), min_size=order - 1, max_size=order - 1)
    sizes = st.lists(size, min_size=order - 1, max_size=order - 1)
    vocab = draw(st.integers(4, 12) | st.just(99_092))
    config = EngramConfig(
        layers=LAYERS, hidden=8, vocab_size=vocab, max_ngram=order, scheme=scheme,
        heads=draw(by_order if scheme == "engram" else st.integers(1, 3)), row_dim=1,
        rows_per_head=draw(sizes if scheme == "engram" else size), pad_id=draw(st.integers(0, 3)),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ids = torch.cat((torch.arange(vocab), torch.randint(vocab, (5,), generator=generator)))
    addressing = Addressing(config, CanonicalVocab(ids, "drawn") if scheme == "engram" else None)
    batch, length = draw(st.integers(1, 3)), draw(st.integers(0, 14))

    def flags(share: float) -> Tensor:
        return torch.rand(batch, length, generator=generator) < share

    tokens = torch.randint(addressing.raw_size, (batch, length), generator=generator)
    tokens[flags(0.2)] = config.pad_id
    start, live = flags(0.3), ~flags(0.3)
    return (
        addressing,
        tokens.to(DEVICE),
        start.to(DEVICE) if draw(st.booleans()) else None,
        live.to(DEVICE) if draw(st.booleans()) else None,
    )


@settings(max_examples=25)
@given(batches(), st.booleans(), st.sampled_from([1, 64, 1024]), st.data())
def test_equals_windows_and_hashes_for_every_chunking(
    batch: Batch, with_mixes: bool, tile: int, data: st.DataObject
) -> None:
    addressing, tokens, start, live = batch
    length = tokens.shape[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=2)))
    histories = [addressing.new_history() if data.draw(st.booleans()) or cuts else None for _ in range(2)]
    for first, last in zip([0, *cuts], [*cuts, length], strict=True):
        chunk, marks, alive = (None if given is None else given[:, first:last] for given in (tokens, start, live))
        assert chunk is not None
        windows = addressing.windows(chunk, history=histories[0], doc_start=marks, live=alive)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(address_kernels, "_ROW_IDS", tile)
            lookup = addressing._lookup_at_once(chunk, histories[1], marks, alive, with_mixes)
        for layer in LAYERS:
            wanted_mixes, wanted = addressing.rows(windows, layer)
            mixes, rows = lookup(layer)
            assert rows.is_contiguous() and torch.equal(rows, wanted)
            assert torch.equal(mixes, wanted_mixes if with_mixes else wanted_mixes[..., :0])
    if histories[0] is not None and histories[1] is not None:
        for mine, theirs in zip(histories[0].last(), histories[1].last(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scheme", ["engram", "qwen_ple"])
@pytest.mark.parametrize("token", [-1, -(2**62), 40, 2**62])
def test_ids_outside_the_map_are_refused_and_leave_the_history_alone(scheme: str, token: int) -> None:
    config = EngramConfig(layers=LAYERS, hidden=8, vocab_size=40, rows_per_head=50, scheme=scheme)
    addressing = Addressing(config, CanonicalVocab(torch.arange(40), "identity") if scheme == "engram" else None)
    history = addressing.new_history()
    tokens = torch.tensor([[1, 2, token, 3]], device=DEVICE)
    with pytest.raises(ValueError, match=f"Token id {token} is outside this memory's vocabulary of 40 ids"):
        addressing._lookup_at_once(tokens, history, None, torch.ones_like(tokens) == 0, False)
    assert len(history) == 0
    addressing._lookup_at_once(torch.tensor([[1, 2]], device=DEVICE), history, None, None, False)
    before = [held.clone() for held in history.last()]
    with pytest.raises(ValueError, match=f"Token id {token} is outside this memory's vocabulary of 40 ids"):
        addressing._lookup_at_once(tokens[:, 2:3], history, None, None, False)  # a step of decoding
    assert all(torch.equal(*pair) for pair in zip(before, history.last(), strict=True))


def test_only_asked_positions_are_checked_and_given_rows() -> None:
    config = EngramConfig(layers=LAYERS, hidden=8, vocab_size=40, rows_per_head=50, scheme="qwen_ple")
    addressing = Addressing(config)
    hashes = Hashes.of(addressing.layouts.values(), None, 40, addressing.pad, DEVICE)
    tokens = torch.randint(40, (2, 9), device=DEVICE)
    flags = torch.zeros_like(tokens, dtype=torch.bool)
    stranger = torch.zeros(1, dtype=torch.bool, device=DEVICE)
    mixes, rows = address_triton(tokens, flags, flags, 4, hashes, True, stranger)
    assert mixes.shape == (2, 2, 5, 2) and rows.shape == (2, 2, 5, 16) and not stranger.item()
    for index, layer in enumerate(LAYERS):
        assert torch.equal(rows[index], addressing.rows(addressing.windows(tokens)[:, 4:], layer)[1])


@settings(max_examples=25)
@given(batches(), st.integers(1, 4))
def test_steps_of_sequences_that_go_on_equal_the_whole(batch: Batch, prompt: int) -> None:
    addressing, tokens, start, live = batch
    history, found = addressing.new_history(drafts=1), []
    cuts = [(0, prompt), *((at, at + 1) for at in range(prompt, tokens.shape[1]))]
    for first, last in cuts:
        chunk, marks, alive = (None if given is None else given[:, first:last] for given in (tokens, start, live))
        assert chunk is not None
        found.append(addressing._lookup_at_once(chunk, history, marks, alive, False)(LAYERS[1])[1])
    windows = addressing.windows(tokens, doc_start=start, live=live)
    assert torch.equal(torch.cat(found, 1), addressing.rows(windows, LAYERS[1])[1])


def test_masks_are_checked_as_they_are_without_the_kernel() -> None:
    addressing = Addressing(EngramConfig(layers=LAYERS, hidden=8, vocab_size=40, rows_per_head=50, scheme="qwen_ple"))
    with pytest.raises(ValueError, match=r"live has the shape \[1, 4\]"):
        addressing._lookup_at_once(torch.ones(2, 4, dtype=torch.int64), None, None, torch.ones(1, 4) == 1, False)


def test_a_bank_that_finds_its_rows_at_once_reads_the_same(make_bank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(60, (2, 9))
    start, live = torch.rand(2, 9) < 0.2, torch.rand(2, 9) > 0.2

    def read(bank: MemoryBank) -> list[Tensor]:
        batch = Tokens(tokens, start, live, bank.new_history())
        memory = bank.read(batch)
        return [memory.wait(layer)[bank.name].cpu() for layer in bank.config.layers]

    wanted = read(make_bank())
    monkeypatch.setattr(
        Addressing,
        "lookup",
        lambda self, tokens, *, history, doc_start, live, with_mixes: self._lookup_at_once(
            tokens, history, doc_start, live, with_mixes
        ),
    )
    for got, want in zip(read(make_bank(device=DEVICE)), wanted, strict=True):
        torch.testing.assert_close(got, want)
