"""Text that has nothing to do with the facts: what a model said of it before is what it should go on to say.

Whatever is taught by a few hundred sentences moves all other text a little: tokens are shared. So a part of every step
is spent on other text, where the loss is the divergence from what the untaught model said (distillation from itself,
as in Learning without Forgetting, Li and Hoiem, arXiv:1606.09282). It gives no new text to learn: perplexity on
held-out documents tells of damage, not of domains. All ways of teaching get the same.
"""

from __future__ import annotations

import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_engram.data import open_corpus, split_of
from torch_engram.data.corpora import Split
from torch_engram.studies.facts.forwards import hidden_states, mixed, output_of

REHEARSED = "english-sotu", "english-python-manual"
ELSEWHERE = "english-plays", "code-python"
"""Kinds of text in the shipped corpus; no WordNet, where the people are. What happens to the second pair tells whether
rehearsal mends more than what it rehearses."""
VALIDATION_SHARE = 0.05
_CHARACTERS = 8
"""Of a token at most, by far: what is cut out of a document before it is tokenised."""


def windows(tokenizer: Any, source: str, count: int, length: int, split: Split | None = None) -> Tensor:
    """``count`` pieces of ``length`` tokens of one source, ``[count, length]``; int64. Each begins at a random place of
    a random document, of a ``split`` or of all, the same in every call."""
    path = Path(str(files("torch_engram.data"))) / "corpus" / f"{source}.txt.xz"
    texts = [text for text in open_corpus(path) if split in (None, split_of(text, VALIDATION_SHARE))]
    texts = [text for text in texts if len(text) > 2 * _CHARACTERS * length]
    draw, found = random.Random(0), list[list[int]]()
    while len(found) < count:
        text = draw.choices(texts, [len(each) for each in texts])[0]
        begin = draw.randrange(len(text) - _CHARACTERS * length)
        tokens = tokenizer(text[begin : begin + _CHARACTERS * length])["input_ids"]
        if len(tokens) >= length:
            found.append(tokens[:length])
    return torch.tensor(found)


def to_rehearse(tokenizer: Any, count: int, length: int) -> Tensor:
    """``count`` pieces of training documents, as many of each source or one less, ``[count, length]``."""
    each = -(-count // len(REHEARSED))
    return torch.cat([windows(tokenizer, name, each, length, "train") for name in REHEARSED])[:count]


class Rehearsal:
    """Pieces of other text ``[N, T]``, and what a model says of them before it is taught."""

    def __init__(self, model: nn.Module, ids: Tensor, seed: int):
        weight = output_of(model).weight
        self._ids = ids.to(weight.device)
        self._order = torch.Generator().manual_seed(seed)
        self._head = weight.detach().clone()  # hidden states and this weigh less than logits
        with torch.no_grad(), mixed(weight.device):
            self._hidden = torch.cat([hidden_states(model, part) for part in self._ids.split(8)])

    def loss(self, model: nn.Module, count: int) -> Tensor:
        """The divergence of what it says of ``count`` pieces now, in nats a token."""
        drawn = torch.randint(len(self._ids), (count,), generator=self._order).to(self._ids.device)
        before = F.linear(self._hidden[drawn], self._head).float().log_softmax(-1)
        now = output_of(model)(hidden_states(model, self._ids[drawn])).float().log_softmax(-1)
        return F.kl_div(now.flatten(0, 1), before.flatten(0, 1), log_target=True, reduction="batchmean")
