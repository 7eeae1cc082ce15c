"""Natural text for measurements on models of transformers: the corpus that ships, its documents mixed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from torch_engram.data import open_corpus


def tokens_of_corpus(tokenizer: Any, tokens: int) -> Tensor:
    """The first ``tokens`` ids int64 of the mixed documents, each ended by the tokenizer's end.

    An ``assert`` fails where the corpus has fewer.
    """
    documents = list(open_corpus("demo"))
    random.Random(0).shuffle(documents)
    found: list[int] = []
    for first in range(0, len(documents), 256):
        encoded = tokenizer(documents[first : first + 256], add_special_tokens=False)["input_ids"]
        for ids in encoded:
            found += [*ids, tokenizer.eos_token_id]
        if len(found) >= tokens:
            return torch.tensor(found[:tokens])
    raise AssertionError(f"the corpus has {len(found):,} tokens, and {tokens:,} are read: take fewer steps")
