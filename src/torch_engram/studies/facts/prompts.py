"""Facts in their wordings as batches of tokens, which know where the subject stands and where the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_engram.data import IGNORE_INDEX
from torch_engram.data.facts import Fact
from torch_engram.studies.facts.wordings import Wordings

Asking = tuple[int, int]
"""A fact's number, and its wording's."""


@dataclass(frozen=True)
class Prompts:
    """Questions with their answers, padded on the right; all are ``[B, T]``."""

    ids: Tensor
    mask: Tensor
    """1 for tokens, 0 for what pads."""
    labels: Tensor
    """The answers; ``IGNORE_INDEX`` elsewhere."""
    told: Tensor
    """True for the tokens of the subject and of the answer but the first one of each, all of whose n-grams begin in the
    wording. At a text's first token, attention rests, whatever the text is about."""

    def to(self, device: torch.device) -> Prompts:
        """A copy there."""
        parts = self.ids, self.mask, self.labels, self.told
        return Prompts(*(part.to(device, non_blocking=True) for part in parts))


class Asked:
    """Facts in every wording, tokenised once."""

    def __init__(self, facts: Sequence[Fact], wordings: Wordings, tokenizer: Any):
        self.facts, self.wordings = facts, wordings
        self._pad = tokenizer.pad_token_id or 0
        self._answers: list[list[int]] = tokenizer([" " + fact.answer for fact in facts])["input_ids"]
        asked = [(fact.subject, wording) for fact in facts for wording in wordings[fact.relation]]
        tokens = tokenizer([wording.format(subject) for subject, wording in asked], return_offsets_mapping=True)
        self._questions: list[list[int]] = tokens["input_ids"]
        self._subjects = [
            _tokens_of(wording.index("{}"), wording.index("{}") + len(subject), offsets)
            for (subject, wording), offsets in zip(asked, tokens["offset_mapping"], strict=True)
        ]
        self._first = [0]
        for fact in facts:
            self._first.append(self._first[-1] + len(wordings[fact.relation]))

    def all(self, most: int | None = None) -> list[Asking]:
        """Every fact in every wording, or in ``most`` of them, which take turns."""
        asked = []
        for number, fact in enumerate(self.facts):
            wordings = len(self.wordings[fact.relation])
            asked += [(number, (number + turn) % wordings) for turn in range(min(most or wordings, wordings))]
        return asked

    def exposures(self, count: int, seed: int) -> Iterator[list[Asking]]:
        """``count`` rounds, each of which has every fact once, in one wording, in an order of its own: a fact's
        wordings take turns."""
        order = torch.Generator().manual_seed(seed)
        for turn in range(count):
            shuffled = torch.randperm(len(self.facts), generator=order).tolist()
            yield [(i, (i + turn) % len(self.wordings[self.facts[i].relation])) for i in shuffled]

    def prompts(self, asked: Sequence[Asking]) -> Prompts:
        """A batch of them."""
        numbers = [self._first[fact] + wording for fact, wording in asked]
        questions, answers = [self._questions[n] for n in numbers], [self._answers[fact] for fact, _ in asked]
        length = max(len(question) + len(answer) for question, answer in zip(questions, answers, strict=True))
        ids = torch.full((len(asked), length), self._pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
        told = torch.zeros_like(ids, dtype=torch.bool)
        for row, (question, answer, number) in enumerate(zip(questions, answers, numbers, strict=True)):
            begin, end = len(question), len(question) + len(answer)
            ids[row, :end] = torch.tensor(question + answer)
            mask[row, :end] = 1
            labels[row, begin:end] = ids[row, begin:end]
            first, last = self._subjects[number]
            told[row, first + 1 : last] = True
            told[row, begin + 1 : end] = True
        return Prompts(ids, mask, labels, told)


def _tokens_of(begin: int, end: int, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Which tokens hold characters ``begin`` to ``end``: the first one, and the one after the last."""
    inside = [place for place, (first, last) in enumerate(offsets) if last > begin and first < end]
    return inside[0], inside[-1] + 1
