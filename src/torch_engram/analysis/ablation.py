"""A memory switched off at inference: what a text's loss says of where the model leans on it.

As a whole (arXiv 2601.07372, section 6.3), or at one block at a time. The model was trained with its memory, so that
what it loses is what it leaves to the memory, and not what the memory would add to a model trained without.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from torch_engram.analysis.subject import Subject, silent
from torch_engram.data import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class Ablation:
    """Losses of one text in nats a token."""

    tokens: int
    whole: float
    """With all of the memory."""
    without: float
    """With none of it."""
    without_one: dict[tuple[str, int], float]
    """With all but a memory at one block."""


@torch.no_grad()
def ablate(subject: Subject, batches: Iterable[Batch]) -> Ablation:
    """The losses of a text. Raises ``ValueError`` for a model without a memory, and where there is no target."""
    if not subject.has_memory:
        raise ValueError("This model has no memory to switch off: give one that was trained or attached with one.")
    batches = list(batches)
    tokens = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)
    if not tokens:
        raise ValueError("No token of this text has a next one in its document: give documents of two tokens or more.")

    def loss() -> float:
        return -sum(float(subject.log_probabilities(batch).double().sum()) for batch in batches) / tokens

    found = {}
    for which, engram in subject.engrams.items():
        with silent(engram):
            found[which] = loss()
    whole = loss()
    with subject.disabled():
        return Ablation(tokens, whole, loss(), found)
