"""The logit lens: how far what a layer would predict is from what the model predicts.

Every state goes through the model's last norm and its head, as if no blocks came after it (nostalgebraist 2020). The
distance is KL(p || p_l) of the model's own distribution p from the state's: the fewer blocks until it is small, the
earlier is the model ready to predict (arXiv 2601.07372, section 6.1.1). Shapes: L blocks, n positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_engram.analysis.subject import Subject
from torch_engram.data import IGNORE_INDEX, Batch

_CHUNK = 256
"""Positions whose logits are held at once."""


@dataclass(frozen=True)
class Lens:
    """What the lens shows of a text."""

    nats: tuple[float, ...]
    """L + 1 divergences, one a state, in nats a token; the last is 0."""
    tokens: int
    """Positions with a target, over which they are averaged."""


def kl_naive(final: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) in nats ``[n]``, of p = softmax(``final``) and q = softmax(``other``), both ``[n, V]``."""
    p, q = final.softmax(-1), other.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def logit_lens_naive(subject: Subject, batch: Batch) -> list[float]:
    """What :func:`logit_lens` measures on one batch, from logits that are held whole."""
    states = subject.states(batch)[:, batch.targets != IGNORE_INDEX]
    return [float(kl_naive(subject.logits(states[-1]), subject.logits(state)).mean()) for state in states]


@torch.no_grad()
def logit_lens(subject: Subject, batches: Iterable[Batch]) -> Lens:
    """KL(p || p_l) of every state l, a mean over all positions with a target, in fp32, a chunk of positions at a time.

    Raises ``ValueError`` where there is no target.
    """
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        targets = batch.targets != IGNORE_INDEX
        tokens += int(targets.sum())
        states = subject.states(batch)
        for chunk in states[:, targets.to(states.device)].split(_CHUNK, dim=1):
            total = total + _summed(subject, chunk).cpu()
    if not tokens:
        raise ValueError("No token of this text has a next one in its document: give documents of two tokens or more.")
    return Lens(tuple((total / tokens).tolist()), tokens)


def _summed(subject: Subject, states: Tensor) -> Tensor:
    """The divergences of states ``[L + 1, n, d]``, summed over positions: fp64 ``[L + 1]``."""
    final = subject.logits(states[-1]).log_softmax(-1)
    p, found = final.exp(), []
    for state in states:
        other = subject.logits(state).log_softmax(-1)
        found.append(torch.linalg.vecdot(p, final - other).sum(dtype=torch.float64))
    return torch.stack(found)
