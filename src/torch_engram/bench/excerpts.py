"""Text that lookups are timed on: natural, and fresh for every read.

No stretch of it is read twice by one bank, for rows that were read lately may be in some cache; a cache of the bank's
own is filled with other text first. Two kinds of reads: chunks of one sequence that goes on (prefill), and one token
each of many sequences that replay different places of the text (decode).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_engram.data import TokenFile

WARM_UP = 3
"""Reads before those that are timed."""
CHECKED = 24
"""Tokens whose embeddings are compared with the files before."""
_WARM_CHUNK = 1024
"""Tokens of a read that fills a cache."""


@dataclass(frozen=True)
class Mode:
    """What one read asks for: ``length`` tokens of each of so many sequences; ``reads`` of them are timed."""

    sequences: int
    length: int
    reads: int

    @property
    def name(self) -> str:
        """``prefill-8192``, ``decode-512``."""
        return f"prefill-{self.length}" if self.length > 1 else f"decode-{self.sequences}"

    @property
    def tokens(self) -> int:
        """Of all reads."""
        return self.sequences * self.length * (self.reads + WARM_UP)


def modes(chunk: int, chunks: int, sequences: Sequence[int], steps: int) -> list[Mode]:
    """Prefill, then decode; none of either where its number of reads is 0."""
    prefill = [Mode(1, chunk, chunks)] if chunks else []
    return prefill + [Mode(many, 1, steps) for many in sequences if steps]


class Excerpts:
    """Fresh text for every mode: stretches at the end of a token file, one after the other.

    ``warm``: tokens before them that fill a cache, fewer where the text has no more. Raises ``ValueError`` for a text
    that is too short for the modes.
    """

    def __init__(self, text: TokenFile, wanted: Sequence[Mode], warm: int = 0):
        needed = sum(mode.tokens for mode in wanted)
        if needed > len(text):
            raise ValueError(
                f"The text has {len(text):,} tokens, and {needed:,} would be read: lower --chunk, --chunks, "
                "--sequences or --steps, or give a longer --text."
            )
        self._text: TokenFile = text
        self._first: dict[Mode, int] = {}
        self.sample = torch.from_numpy(text.tokens[:CHECKED].astype(np.int64))[None]
        """Ids ``[1, T]`` to check a bank with."""
        at = self._timed = len(text) - needed
        self.warm: int = min(warm, at)
        """Tokens that fill a cache."""
        for mode in wanted:
            self._first[mode] = at
            at += mode.tokens

    def reads(self, mode: Mode) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids int64 and document starts ``[sequences, length]`` of every read; each sequence goes on from one read to
        the next."""
        ids, starts = (part.view(mode.sequences, -1) for part in self._stretch(self._first[mode], mode.tokens))
        yield from zip(ids.split(mode.length, 1), starts.split(mode.length, 1), strict=True)

    def warming(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and document starts ``[1, T]`` of the reads that fill a cache, one sequence that goes on."""
        if self.warm:
            ids, starts = (part[None] for part in self._stretch(self._timed - self.warm, self.warm))
            yield from zip(ids.split(_WARM_CHUNK, 1), starts.split(_WARM_CHUNK, 1), strict=True)

    def _stretch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Ids int64 and document starts of so many tokens, both flat."""
        ids = torch.from_numpy(self._text.tokens[first : first + count].astype(np.int64))
        starts = torch.zeros(count, dtype=torch.bool)
        inside = self._text.starts[(self._text.starts >= first) & (self._text.starts < first + count)]
        starts[torch.from_numpy(inside - first)] = True
        return ids, starts
