"""Where a fact lives: which n-grams of a prompt bring the rows that make its answer likely, and how many of them.

Of every n-gram that ends in the prompt or in the answer: `lost`, the nats that the answer loses when what the n-gram
looked up is zero (ablation, exact but blind to what others would take over), and `attributed`, the gradient of its
log-probability times what was looked up (attribution, to first order). Shapes: B n-grams at once, T tokens, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from torch_engram.analysis.subject import Subject
from torch_engram.data import IGNORE_INDEX, Batch

_AT_ONCE = 64
"""N-grams that are switched off in one forward, a sequence each."""


@dataclass(frozen=True)
class Carrier:
    """What one n-gram's rows do for the answer."""

    memory: str
    layer: int
    order: int
    position: int
    """Of the n-gram's last token."""
    text: str
    """The n-gram."""
    lost: float
    """Nats of the answer without its rows."""
    attributed: float
    """Nats, to first order."""


@dataclass(frozen=True)
class Located:
    """The answer's log-probability, all tokens of it together, and what carries it."""

    log_probability: float
    without: float
    """Without any memory."""
    carriers: tuple[Carrier, ...]
    """The most that is lost first."""

    def half(self) -> int:
        """How many n-grams, the most that is lost first, lose half of what all carriers lose one by one: the fewer, the
        more local is the fact. 0 where none loses anything."""
        gains = [max(0.0, carrier.lost) for carrier in self.carriers]
        total, held = sum(gains), 0.0
        for count, gain in enumerate(gains, 1):
            held += gain
            if total and held >= total / 2:
                return count
        return 0


def locate(subject: Subject, prompt: str, answer: str) -> Located:
    """What makes ``answer`` follow ``prompt``. Raises ``ValueError`` for a model without a memory, and where one of the
    two has no token of its own."""
    if not subject.has_memory:
        raise ValueError("This model has no memory that a fact could be in: give one with a memory.")
    batch, spans = _tokens(subject, prompt, answer)
    whole, gradients, embeddings = _attribute(subject, batch)
    with torch.no_grad(), subject.disabled():
        without = float(subject.log_probabilities(batch).sum())
    places = [
        (which, order, columns, position)
        for which in subject.engrams
        for order, columns in _columns(subject, which[0])
        for position in range(batch.tokens.shape[1])
    ]
    carriers = []
    for first in range(0, len(places), _AT_ONCE):
        part = places[first : first + _AT_ONCE]
        lost = whole - _switched_off(subject, batch, part)
        for (which, order, columns, position), nats in zip(part, lost.tolist(), strict=True):
            product = gradients[which][0, position, columns] * embeddings[which][0, position, columns]
            text = (prompt + answer)[spans[max(0, position - order + 1)][0] : spans[position][1]]
            carriers.append(Carrier(*which, order, position, text, nats, float(product.sum())))
    return Located(whole, without, tuple(sorted(carriers, key=lambda carrier: -carrier.lost)))


_Place = tuple[tuple[str, int], int, slice, int]


def _tokens(subject: Subject, prompt: str, answer: str) -> tuple[Batch, list[tuple[int, int]]]:
    """One sequence whose targets are the answer's tokens, and where in the text its tokens stand."""
    encoding = subject.tokenizer.encode(prompt + answer, add_special_tokens=False)
    ids, spans = torch.tensor([encoding.ids]), encoding.offsets
    ends = torch.tensor([end > len(prompt) for _, end in spans])  # a space may belong to the answer's first token
    if not ends[1:].any() or bool(ends[0]):
        raise ValueError("A prompt and an answer need a token each: give both, with the space between them in one.")
    targets = ids[:, 1:].masked_fill(~ends[1:], IGNORE_INDEX)
    doc_start = torch.zeros_like(targets, dtype=torch.bool)
    doc_start[:, 0] = True
    return Batch(ids[:, :-1], targets, doc_start), spans


def _columns(subject: Subject, name: str) -> Iterator[tuple[int, slice]]:
    """Of each order, which numbers of an embedding are its rows."""
    config, first = subject.config(name), 0
    for order, heads, width in zip(config.orders, config.per_order("heads"), config.per_order("row_dim"), strict=True):
        yield order, slice(first, first + heads * width)
        first += heads * width


Looked = dict[tuple[str, int], Tensor]


def _attribute(subject: Subject, batch: Batch) -> tuple[float, Looked, Looked]:
    """The answer's log-probability, its gradients in what is looked up, and that: fp32 ``[1, T, E]``."""
    embeddings: Looked = {}

    def watch(which: tuple[str, int], looked: Tensor) -> Tensor:
        embeddings[which] = looked.detach().requires_grad_()
        return embeddings[which]

    with torch.enable_grad(), ExitStack() as hooks:
        for which, engram in subject.engrams.items():
            hooks.enter_context(_changed(engram, partial(watch, which)))
        found = subject.log_probabilities(batch).sum()
        gradients = torch.autograd.grad(found, list(embeddings.values()), allow_unused=True, materialize_grads=True)
    looked = {which: each.detach() for which, each in embeddings.items()}
    return float(found.detach()), dict(zip(looked, gradients, strict=True)), looked


@torch.no_grad()
def _switched_off(subject: Subject, batch: Batch, places: list[_Place]) -> Tensor:
    """The answer's log-probability ``[B]`` without the rows of each place."""
    many = Batch(*(part.repeat(len(places), 1) for part in (batch.tokens, batch.targets, batch.doc_start)))

    def zeroed(which: tuple[str, int], looked: Tensor) -> Tensor:
        looked = looked.clone()
        for row, (own, _, columns, position) in enumerate(places):
            if own == which:
                looked[row, position, columns] = 0
        return looked

    with ExitStack() as hooks:
        for which, engram in subject.engrams.items():
            hooks.enter_context(_changed(engram, partial(zeroed, which)))
        return subject.log_probabilities(many).sum(1).cpu()


@contextmanager
def _changed(engram: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, a module is given what ``change`` makes of its embeddings."""
    handle = engram.register_forward_pre_hook(lambda _, args: (args[0], change(args[1])))
    try:
        yield
    finally:
        handle.remove()
