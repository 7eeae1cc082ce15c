"""The logit lens against the formula, and on a model whose answer is known."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_engram.analysis import lens
from torch_engram.analysis.lens import kl_naive, logit_lens, logit_lens_naive
from torch_engram.analysis.subject import open_subject
from torch_engram.data import IGNORE_INDEX, Batch


class Known:
    """Its states are logits already: a quarter for the first of two tokens, then a half, whatever it reads."""

    tokenizer: Any = None
    has_memory = False
    most = 0

    def states(self, batch: Batch) -> Tensor:
        early, late = torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log()
        states = torch.stack((early, late))[:, None, None].repeat(1, *batch.tokens.shape, 1)
        states[0][batch.targets == IGNORE_INDEX] = 50.0  # which must not be looked at
        return states

    def logits(self, states: Tensor) -> Tensor:
        self.most = max(self.most, len(states))
        return states

    def disabled(self) -> Any:
        return nullcontext()


def batch(size: int = 3, length: int = 11, vocab: int = 300) -> Batch:
    tokens = torch.randint(3, vocab, (size, length + 1), generator=torch.Generator().manual_seed(3))
    starts = torch.zeros(size, length, dtype=torch.bool)
    starts[:, 0] = starts[1, 5] = True
    targets = tokens[:, 1:].clone()
    targets[1, 4] = IGNORE_INDEX
    return Batch(tokens[:, :-1].contiguous(), targets, starts)


def test_two_distributions_by_hand() -> None:
    found = logit_lens(Known(), [batch(), batch(2)])
    assert found.tokens == 3 * 11 - 1 + 2 * 11 - 1
    assert found.nats == pytest.approx((0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), 0.0))


def test_the_formula_of_the_divergence() -> None:
    """The naive form against PyTorch's own distributions; it is not symmetric."""
    p, q = torch.randn(2, 5, 7).double()
    own = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(kl_naive(p, q), own)
    assert not torch.allclose(kl_naive(q, p), own)


def test_it_equals_the_naive_form_in_any_chunks(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, given = open_subject(checkpoint), batch()
    naive = logit_lens_naive(subject, given)
    assert len(naive) == 3 and naive[0] > naive[1] > 1e-3 and naive[2] == 0
    for chunk in (256, 5):
        monkeypatch.setattr(lens, "_CHUNK", chunk)
        assert logit_lens(subject, [given]).nats == pytest.approx(naive, rel=1e-4, abs=1e-7)


def test_no_more_logits_than_a_chunk_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Known()
    monkeypatch.setattr(lens, "_CHUNK", 7)
    logit_lens(subject, [batch()])
    assert subject.most == 7


def test_batches_are_weighed_by_their_tokens(checkpoint: Path) -> None:
    subject, one, two = open_subject(checkpoint), batch(3), batch(2, 6)
    parts = [logit_lens(subject, [given]) for given in (one, two)]
    both = logit_lens(subject, [one, two])
    weighed = sum(torch.tensor(part.nats) * part.tokens for part in parts) / both.tokens
    assert both.nats == pytest.approx(weighed.tolist())


def test_a_memory_moves_the_lens(checkpoint: Path) -> None:
    subject, given = open_subject(checkpoint), batch()
    before = logit_lens(subject, [given])
    with subject.disabled():
        off = logit_lens(subject, [given])
    assert off.nats != pytest.approx(before.nats, rel=1e-3) and off.nats[-1] == 0


def test_a_text_without_a_target() -> None:
    given = batch()
    given.targets.fill_(IGNORE_INDEX)
    with pytest.raises(ValueError, match="No token of this text has a next one"):
        logit_lens(Known(), [given])
