"""A step of decoding on a CPU finds the rows that the whole sequence has there; what is refused changes no history."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from test_address_kernels import Batch, batches

from torch_engram.addressing import Addressing
from torch_engram.config import EngramConfig


@settings(max_examples=40)
@given(batches())
def test_equals_the_whole(batch: Batch) -> None:
    addressing, *given_ = batch
    tokens, start, live = (None if mask is None else mask.cpu() for mask in given_)
    assert tokens is not None
    layers = list(addressing.layouts)
    expected = addressing.lookup(tokens, doc_start=start, live=live).of(layers)
    history = addressing.new_history()
    for at in range(tokens.shape[1]):
        now = [None if mask is None else mask[:, at : at + 1] for mask in (tokens, start, live)]
        found = addressing.lookup(now[0], history=history, doc_start=now[1], live=now[2])
        one = addressing.lookup(now[0], doc_start=now[1], live=now[2])
        assert [part.shape for part in found.of(layers)] == [part.shape for part in one.of(layers)]
        for mine, theirs in zip(found.of(layers), expected, strict=True):
            assert torch.equal(mine, theirs[:, :, at : at + 1])
        assert torch.equal(found(layers[1])[1], expected[1][1, :, at : at + 1])


@pytest.mark.parametrize("token", [-1, 40])
def test_a_strange_id_is_refused_and_not_remembered(token: int) -> None:
    addressing = Addressing(EngramConfig(layers=(1,), hidden=8, vocab_size=40, rows_per_head=50, scheme="qwen_ple"))
    history = addressing.new_history()
    addressing.lookup(torch.tensor([[5, 6, 7]]), history=history)
    with pytest.raises(ValueError, match=f"Token id {token} is outside this memory's vocabulary"):
        addressing.lookup(torch.tensor([[token]]), history=history)
    assert history.last()[0].tolist() == [[6, 7]]
    with pytest.raises(RuntimeError):  # of two sequences
        addressing.lookup(torch.tensor([[1], [2]]), history=history)
