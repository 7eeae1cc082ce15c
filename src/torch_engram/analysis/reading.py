"""A text for an instrument: its first tokens in batches, and at which of their positions to look.

Shapes: B sequences, T tokens of each.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from torch_engram.data import IGNORE_INDEX, Batch, open_corpus

BATCH, LENGTH = 8, 256


@dataclass(frozen=True)
class Reading:
    """One batch of a text."""

    batch: Batch
    chosen: Tensor
    """Bool ``[B, T]``: where to look."""


def read_text(
    source: str | Path,
    tokenizer: Tokenizer,
    tokens: int,
    *,
    entities: Sequence[str] = (),
    batch: int = BATCH,
    length: int = LENGTH,
) -> list[Reading]:
    """The first ``tokens`` tokens of a corpus, or all where it has fewer, in sequences of ``length``.

    Documents follow each other as in :mod:`torch_engram.data.batches`, without end tokens; less than a sequence at the
    end is left out. All positions are chosen, or with ``entities`` the last token of every place where one of these
    texts stands in a document, as in arXiv 2601.07372, section 6.1.2. Raises ``ValueError`` as
    :func:`~torch_engram.data.open_corpus` does, for fewer than two tokens, and where no entity is found.
    """
    ids, starts, chosen = list[int](), list[bool](), list[bool]()
    for document, encoding in _documents(source, tokenizer):
        ids += encoding.ids
        starts += [place == 0 for place in range(len(encoding))]
        marked = set(last_tokens(document, encoding, entities))
        chosen += [not entities or place in marked for place in range(len(encoding))]
        if len(ids) > tokens:
            break
    length = min(length, tokens, len(ids) - 1)
    if length < 1:
        raise ValueError(f"Of {str(source)!r} {min(tokens, len(ids))} tokens are to be read: read at least two.")
    # One more than is read, so that the last token has a target.
    used = min(tokens, len(ids) - 1) // length * length
    stream, begins = torch.tensor(ids[: used + 1]), torch.tensor(starts[: used + 1])
    targets = stream[1:].masked_fill(begins[1:], IGNORE_INDEX).view(-1, length)
    doc_start = begins[:-1].view(-1, length).clone()
    doc_start[:, 0] = True
    here = torch.tensor(chosen[:used]).view(-1, length)
    if not here.any():
        raise ValueError(f"None of the {len(entities)} entities stands in the {used} tokens that were read: read more.")
    parts = (part.split(batch) for part in (stream[:-1].view(-1, length), targets, doc_start, here))
    return [Reading(Batch(*three), where) for *three, where in zip(*parts, strict=True)]


def last_tokens(document: str, encoding: Encoding, entities: Sequence[str]) -> Iterator[int]:
    """The place of the last token of every match of every entity in a document. Texts are compared as they are."""
    begins = [begin for begin, _ in encoding.offsets]
    for entity in entities:
        for match in re.finditer(re.escape(entity), document):
            # A character may be several tokens, which all begin where it does: the last one is meant.
            yield bisect_left(begins, match.end()) - 1


def _documents(source: str | Path, tokenizer: Tokenizer) -> Iterator[tuple[str, Encoding]]:
    encoder = Tokenizer.from_str(tokenizer.to_str())  # a copy: the caller's may truncate, pad or read special tokens
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    for document in open_corpus(source):
        yield document, encoder.encode(document, add_special_tokens=False)
