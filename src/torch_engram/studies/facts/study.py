"""The study: which runs there are at which scale, and one run from the untaught model to its scores."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

import torch

from torch_engram.data.facts import Fact, people
from torch_engram.studies.facts.other_text import Rehearsal, to_rehearse
from torch_engram.studies.facts.prompts import Asked
from torch_engram.studies.facts.scoring import Exam
from torch_engram.studies.facts.teaching import Lessons, Watch, teach
from torch_engram.studies.facts.ways import Rates, Way, begin
from torch_engram.studies.facts.wordings import EXAMPLES, TRAINED
from torch_engram.studies.smollm2 import load_smollm2


@dataclass(frozen=True)
class Scale:
    """What the runs of a study share."""

    people: int
    skipped: int
    """People before them in an order that was drawn once: those that settings were chosen on."""
    batch: int
    pieces: int
    """Of other text, of which some are drawn at every step."""
    piece: int
    """Tokens of each."""
    weight: float
    """Of other text's loss, over that of answers; both are of a token in the mean."""
    memory: dict[str, Any]
    """Fields of the memory's configuration; LoRA's rank follows from them."""
    asked: int | None = None
    """Trained wordings in which a fact is asked for; None for all."""
    known: int = 1
    """Of so many capitals and elements one is asked for."""
    scored: int = 32
    """Pieces of each source of other text on which perplexity is measured."""


@dataclass(frozen=True)
class FactsRun:
    """One way to teach, scored after several exposures."""

    way: Way | Literal["untaught"]
    scale: Scale
    rates: Rates
    exposures: tuple[int, ...] = ()
    rehearsed: int = 0
    """Pieces of other text a step."""
    told_only: bool = True
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(self.exposures, default=0) * -(-len(facts_of(self.scale)) // self.scale.batch)


_BLOCKS = tuple(range(4, 16))
SMALL = Scale(
    people=6, skipped=800, batch=6, pieces=16, piece=64, weight=4, asked=2, known=4, scored=2,
    memory={"layers": _BLOCKS, "rows_per_head": 5_000, "heads": 4, "row_dim": 64, "conv_kernel": 0},
)  # fmt: skip
FULL = Scale(
    people=400, skipped=400, batch=64, pieces=4096, piece=128, weight=14,
    memory={"layers": _BLOCKS, "rows_per_head": 100_000, "heads": 4, "row_dim": 64, "conv_kernel": 0},
)  # fmt: skip


def small() -> list[FactsRun]:
    """A few people, for a CPU. In so few steps a memory's modules want a higher rate."""
    return _ways(SMALL, Rates(3e-3, rows=0.05), (4, 16), 1)


def full() -> list[FactsRun]:
    """Hundreds of people, for a GPU: the three ways, with other seeds and other rates, and what each part is worth."""
    best = _ways(FULL, Rates(1e-3, rows=0.05), (1, 4, 16, 64), 16)
    memory, lora, weights = shorter = [replace(run, exposures=run.exposures[:3]) for run in best[1:]]
    others = [replace(run, seed=seed) for seed in (1, 2) for run in shorter]
    others += [replace(lora, rates=Rates(rate)) for rate in (5e-4, 2e-3)]
    others += [replace(weights, rates=Rates(rate)) for rate in (5e-5, 2e-4)]
    others += [replace(memory, told_only=False)]
    others += [replace(run, rehearsed=0) for run in shorter]
    return best + others


def _ways(scale: Scale, memory: Rates, exposures: tuple[int, ...], rehearsed: int) -> list[FactsRun]:
    rates: dict[Way, Rates] = {"memory": memory, "lora": Rates(1e-3), "full": Rates(1e-4)}
    return [FactsRun("untaught", scale, Rates(0.0))] + [
        FactsRun(way, scale, rate, exposures, rehearsed) for way, rate in rates.items()
    ]


def facts_of(scale: Scale) -> list[Fact]:
    """The facts that are taught."""
    everybody = [fact for fact in people() if fact.subject not in EXAMPLES]
    names = sorted({fact.subject for fact in everybody})
    drawn = random.Random(0).sample(names, len(names))
    chosen = set(drawn[scale.skipped : scale.skipped + scale.people])
    return [fact for fact in everybody if fact.subject in chosen]


def run_facts(run: FactsRun, device: str, watch: Watch = lambda step, loss: None) -> Iterator[dict[str, Any]]:
    """Teach SmolLM2, and score it: yields a dictionary for each of the run's exposures, or one for 0."""
    loaded, tokenizer = _smollm2()
    model, scale, facts = copy.deepcopy(loaded).to(device), run.scale, facts_of(run.scale)
    torch.manual_seed(run.seed)
    exam = Exam(facts, tokenizer, most=scale.asked, every=scale.known, pieces=scale.scored)
    if run.way == "untaught":
        yield {"exposures": 0, **asdict(exam.score(model))}
        return
    rehearsal = Rehearsal(model, to_rehearse(tokenizer, scale.pieces, scale.piece), run.seed)
    lessons = Lessons(
        Asked(facts, TRAINED, tokenizer), scale.batch, rehearsal, run.rehearsed, scale.weight, run.told_only, run.seed
    )
    taught = begin(run.way, model, tokenizer, scale.memory, run.rates)
    try:
        for exposures, seconds in teach(taught, lessons, run.exposures, watch):
            numbers = {"read": taught.read, "trained": taught.trained()}
            yield {"exposures": exposures, "seconds": seconds, "numbers": numbers, **asdict(exam.score(taught.model))}
    finally:
        if taught.memory is not None:  # it and its model hold each other, and a device's memory with them
            taught.memory.detach()


@cache
def _smollm2() -> tuple[Any, Any]:
    """Loaded once a process."""
    return load_smollm2()
