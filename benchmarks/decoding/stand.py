"""What measurements of decoding stand on: a text in two halves, sequences of many lengths, and where results go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from record import record
from torch import Tensor

from decoding.attention import RaggedCache, attend
from decoding.model import DecodeModel, Shape
from decoding.replay import Batch, Decoding
from torch_engram.addressing import CanonicalVocab
from torch_engram.bench.cache_hits import Counts, Hits
from torch_engram.bench.timing import in_turns, median
from torch_engram.data import TokenFile, load_tokenizer, open_corpus, tokenize_corpus
from torch_engram.fusion import Engram
from torch_engram.memory import MemoryBank

TOKENS = Path(__file__).parents[2] / ".cache" / "tokens"
LENGTHS = 100, 1024
"""Tokens of the shortest and the longest sequence at first."""
WARM_READ = (4, 8192)
"""Stretches and their tokens of one read that fills a cache."""
WARM_SECONDS = 25.0
"""When filling a cache ends at the latest."""
_START = time.perf_counter()

Note = Callable[..., None]
"""``note(case, samples, unit)``, and ``reference`` and ``ratio`` as for :func:`record`."""


def tell(what: str) -> None:
    """How far it is, and after how many seconds."""
    print(f"{time.perf_counter() - _START:4.0f} s: {what}", flush=True)


class Text:
    """The tokens of a corpus, its documents one after the other: those of the first half warm caches, those of the
    second are decoded, and no two stretches that were taken overlap."""

    def __init__(self, corpus: str, tokenizer: str):
        loaded = load_tokenizer(tokenizer)
        self.vocab = CanonicalVocab.of(loaded)
        self._file: TokenFile = tokenize_corpus(open_corpus(corpus), loaded, TOKENS, validation_share=0.0).train
        starts = self._file.starts
        self._half = int(starts[np.searchsorted(starts, len(self._file) // 2)])
        self._taken = 0

    def fresh(self, sequences: int, length: int) -> Tensor:
        """Ids int64 ``[sequences, length]`` of the second half, evenly apart. ``sequences`` is a power of two, so that
        stretches of other numbers of sequences begin where these do, or far from them."""
        rest = len(self._file) - self._half
        assert self._taken + length <= rest // sequences, f"the text has {len(self._file):,} tokens: give a longer one"
        begins = [self._half + rest * each // sequences + self._taken for each in range(sequences)]
        self._taken += length
        return torch.stack([self._ids(begin, length) for begin in begins])

    def warm(self, bank: MemoryBank, tokens: int) -> int:
        """Fill a bank's cache with the last ``tokens`` of the first half, or as many as there is time for; how many
        that were."""
        (many, length), tokens = WARM_READ, min(tokens, self._half)
        length = max(1, min(length, tokens // many))
        start, read = time.perf_counter(), 0
        while read + many * length <= tokens and time.perf_counter() - start < WARM_SECONDS:
            ids = self._ids(self._half - tokens + read, many * length).view(many, length)
            memory = bank.read(ids.to(bank.device))
            for layer in bank.config.layers:
                memory.wait(layer)
            read += many * length
        bank.settle()
        return read

    def _ids(self, first: int, count: int) -> Tensor:
        return torch.from_numpy(self._file.tokens[first : first + count].astype(np.int64))


def spread(sequences: int, shortest: int, longest: int) -> list[int]:
    """Lengths evenly from ``shortest`` to ``longest``, the longest first, so that no long one is begun last."""
    width = (longest - shortest) / sequences
    return [round(longest - width * (each + 0.5)) for each in range(sequences)]


def build(shape: Shape, sequences: int, steps: int, text: Tensor, device: torch.device) -> Batch:
    """A model with its cache of keys and values, attention's setting chosen."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths = spread(sequences, *LENGTHS)
    cache = RaggedCache(lengths, steps + 1, shape.layers, shape.groups, shape.width, device, dtype)
    model = DecodeModel(shape, cache.positions, device, dtype)
    if device.type == "cuda":
        from decoding.kernels import choose_setting

        qkv = torch.randn(sequences, (shape.heads + 2 * shape.groups) * shape.width, device=device, dtype=dtype)
        norms = model.layers[0].query_norm, model.layers[0].key_norm
        chosen = choose_setting(lambda: attend(qkv, *norms, model.cos, model.sin, cache, 0))
        tell(f"{sequences} sequences, attention {chosen}")
    return Batch(model, cache, text)


def take(
    ways: Mapping[str, Decoding], cached: MemoryBank, rounds: int, steps: int
) -> tuple[dict[str, list[float]], float | None]:
    """Tokens a second of every way, one sample a round, in which they take turns; and of n-grams what the cache of
    ``cached`` had. Raises ``ValueError`` for a way whose memory is not that of its tokens."""
    takes = {name: partial(way.rate, steps) for name, way in ways.items()}
    in_turns(takes, 1)
    for way in ways.values():
        way.require_right()
    tell("all graphs are captured and have run")
    before = cached.cache_counts()
    rates = in_turns(takes, rounds)
    return rates, share_found(before, cached.cache_counts())


def engram_for(bank: MemoryBank, hidden: int) -> Engram:
    """The module, of random weights, that adds a bank's rows to a hidden state of one branch."""
    config = replace(bank.config, hidden=hidden, branches=1)
    with torch.device(bank.device):
        module = Engram(config).to(bank.dtype)
    return module.requires_grad_(False)


def below(rates: Sequence[float], others: Sequence[float]) -> list[float]:
    """By what share the first are below the second, pair by pair."""
    return [1 - rate / other for rate, other in zip(rates, others, strict=True)]


def share_found(before: Counts, after: Counts) -> float | None:
    """Of n-grams, what a cache had between two counts; None where nothing was counted."""
    hits = Hits.between(before, after)
    return hits.together if hits is not None and sum(hits.asked.values()) else None


def notes(claim: str, device: torch.device, keep: bool) -> Note:
    """Where the results of a claim are written; without ``keep`` they are only told."""

    def note(case: str, samples: Sequence[float], unit: str, **others: float) -> None:
        if keep:
            record(claim, case, samples, unit, device=device.type, **others)
        else:
            print(f"{claim} {case}: {median(list(samples)):.6g} {unit} (not kept, n {len(samples)})", flush=True)

    return note
