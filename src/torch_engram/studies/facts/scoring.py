"""What is asked of a model: recall in trained and in held-out wordings, what it knew before, and other text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_engram.data import IGNORE_INDEX
from torch_engram.data.facts import Fact, capitals, elements
from torch_engram.studies.facts.forwards import hidden_states, mixed, output_of
from torch_engram.studies.facts.other_text import ELSEWHERE, REHEARSED, windows
from torch_engram.studies.facts.prompts import Asked, Asking, Prompts
from torch_engram.studies.facts.wordings import HELD_OUT, KNOWN, TRAINED

_BATCH = 128
"""Prompts at once."""
_PIECE = 256
"""Tokens of a piece of other text."""


@dataclass(frozen=True)
class Score:
    """Shares of questions that were answered, by relation, and other text."""

    trained: dict[str, float]
    held_out: dict[str, float]
    known: dict[str, float]
    other_text: dict[str, float]
    """Nats a token, by source."""


def known_facts() -> list[Fact]:
    """Capitals and elements with one answer each, and none that an example gives away."""
    facts = [*capitals(), *elements()]
    subjects = Counter(fact.subject for fact in facts)
    shown = " ".join(wording for wordings in KNOWN.values() for wording in wordings)
    return [fact for fact in facts if subjects[fact.subject] == 1 and f" {fact.subject} is {fact.answer}." not in shown]


class Exam:
    """The questions and the text, tokenised once.

    An answer is right where every token of it is the likeliest one after those before it, which is what greedy
    decoding gives. ``most``: trained wordings in which each fact is asked for. ``every``: of how many capitals and
    elements one is asked for. ``pieces``: of each source of other text, in documents that are not rehearsed.
    """

    def __init__(self, facts: Sequence[Fact], tokenizer: Any, *, most: int | None, every: int, pieces: int):
        self._trained, self._most = Asked(facts, TRAINED, tokenizer), most
        self._held_out = Asked(facts, HELD_OUT, tokenizer)
        self._known = Asked(known_facts()[::every], KNOWN, tokenizer)
        self._other = {name: windows(tokenizer, name, pieces, _PIECE, "validation") for name in REHEARSED}
        self._other |= {name: windows(tokenizer, name, pieces, _PIECE) for name in ELSEWHERE}

    @torch.no_grad()
    def score(self, model: nn.Module) -> Score:
        """Takes it in eval mode, and leaves it as it was."""
        training = model.training
        model.eval()
        score = Score(
            recall(model, self._trained, self._trained.all(self._most)),
            recall(model, self._held_out, self._held_out.all()),
            recall(model, self._known, self._known.all()),
            {name: _nats(model, pieces) for name, pieces in self._other.items()},
        )
        model.train(training)
        return score


def answer_logits(model: nn.Module, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[N, V]`` and ids ``[N]`` of all answers' tokens, and where they stand, ``[B, T - 1]``."""
    hidden, labels = hidden_states(model, prompts.ids, prompts.mask), prompts.labels[:, 1:]
    at = labels != IGNORE_INDEX
    return output_of(model)(hidden[:, :-1][at]), labels[at], at


def recall(model: nn.Module, asked: Asked, which: Sequence[Asking]) -> dict[str, float]:
    """By relation, the share of questions that a model answers; in eval mode, without gradients."""
    device = output_of(model).weight.device
    right: Counter[str] = Counter()
    for first in range(0, len(which), _BATCH):
        part = which[first : first + _BATCH]
        with mixed(device):
            logits, ids, at = answer_logits(model, asked.prompts(part).to(device))
        wrong = torch.zeros_like(at)
        wrong[at] = logits.argmax(-1) != ids
        for (fact, _), missed in zip(part, wrong.any(1).tolist(), strict=True):
            right[asked.facts[fact].relation] += not missed
    all_asked = Counter(asked.facts[fact].relation for fact, _ in which)
    return {relation: right[relation] / count for relation, count in all_asked.items()}


def _nats(model: nn.Module, pieces: Tensor) -> float:
    """A token, of pieces ``[N, T]``."""
    device, nats = output_of(model).weight.device, 0.0
    for part in pieces.split(8):
        ids = part.to(device)
        with mixed(device):
            logits = output_of(model)(hidden_states(model, ids)[:, :-1])
        nats += F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return nats / pieces[:, 1:].numel()
