"""Teaching: every fact once an exposure, other text beside it, and a score after chosen exposures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from torch_engram.studies.facts.forwards import mixed
from torch_engram.studies.facts.other_text import Rehearsal
from torch_engram.studies.facts.prompts import Asked, Asking, Prompts
from torch_engram.studies.facts.scoring import answer_logits
from torch_engram.studies.facts.ways import Taught

_WARMUP = 20
"""Steps, but no more than an eighth of all, until the rates are reached; they stay there, so that one run can be scored
at every exposure."""
_CLIP = 1.0
Watch = Callable[[int, float], None]
"""Is told steps and losses."""


@dataclass
class Lessons:
    """What is taught: facts, in batches of ``batch``, and ``rehearsed`` pieces of other text a step."""

    facts: Asked
    batch: int
    rehearsal: Rehearsal
    rehearsed: int
    weight: float
    """Of the loss of other text, over that of answers; both are of a token in the mean."""
    told_only: bool
    """Whether a memory is taught facts at names and answers alone. Other text teaches it no new rows."""
    seed: int

    def steps(self, count: int) -> int:
        """Of the optimiser, in ``count`` exposures."""
        return count * -(-len(self.facts.facts) // self.batch)

    def rounds(self, count: int) -> Iterator[list[list[Asking]]]:
        """The batches of each of ``count`` exposures."""
        for asked in self.facts.exposures(count, self.seed):
            yield [asked[first : first + self.batch] for first in range(0, len(asked), self.batch)]


def teach(taught: Taught, lessons: Lessons, marks: tuple[int, ...], watch: Watch) -> Iterator[tuple[int, float]]:
    """Yields each exposure of ``marks`` with the seconds of teaching so far, once the facts were seen as often."""
    optimizer, step, seconds = taught.optimizer, 0, 0.0
    slow = max(1, min(_WARMUP, lessons.steps(max(marks)) // 8))
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / slow))
    taught.model.train()
    for exposure, batches in enumerate(lessons.rounds(max(marks)), 1):
        begun = time.perf_counter()
        for batch in batches:
            loss = _backward(taught, lessons, batch)
            torch.nn.utils.clip_grad_norm_(taught.weights(), _CLIP)
            optimizer.step()
            warmup.step()
            optimizer.zero_grad()
            step += 1
            watch(step, loss)
        seconds += time.perf_counter() - begun
        if exposure in marks:
            yield exposure, seconds


def _backward(taught: Taught, lessons: Lessons, batch: list[Asking]) -> float:
    """Gradients of one step: of answers, then of other text. Returns the loss of answers, in nats a token."""
    device = next(taught.model.parameters()).device
    prompts: Prompts = lessons.facts.prompts(batch).to(device)
    positions = prompts.told if lessons.told_only else prompts.mask.bool()
    with taught.at(positions), mixed(device):
        logits, ids, _ = answer_logits(taught.model, prompts)
    loss = F.cross_entropy(logits.float(), ids)
    loss.backward()
    if lessons.rehearsed:
        with taught.rehearsing(), mixed(device):
            divergence = lessons.rehearsal.loss(taught.model, lessons.rehearsed)
        (lessons.weight * divergence).backward()
    return loss.item()
