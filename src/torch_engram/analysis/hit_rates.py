"""How often an n-gram is asked for again, and so what caches of every size and deduplication save of a text's lookups.

All heads of an order and all layers read an n-gram's rows at the same time, so that an n-gram is what a cache holds:
one entry with the records of every head and layer. One LRU cache holds the n-grams of all orders. It sees a text as a
server does, a step at a time: a chunk of one document after the other in prefill, a token of each sequence in decode.
A step asks once for every n-gram that it has, and what it has asked for is in the cache when the next one begins.

A cache may hold rows instead, each record on its own, and then also finds one that another n-gram has brought. All
heads of all layers hash alike, so that one head with its share of the cache tells what all do: its rows are numbered as
n-grams are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torch_engram.addressing import Addressing
from torch_engram.analysis.reuse import AGAIN, reuse_bytes
from torch_engram.data import TokenFile

_PIECE = 2**18  # positions whose rows are found at once, those of all heads

_Ints = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Ngrams:
    """The n-grams of a text as the hash sees them, numbered. No two orders share a number."""

    orders: tuple[int, ...]
    ids: _Ints
    """int32 ``[orders, T]``: the n-gram that ends at each token."""

    def part(self, start: int, stop: int) -> Ngrams:
        """Those of the tokens from ``start`` to ``stop``."""
        return Ngrams(self.orders, self.ids[:, start:stop])

    def up_to(self, order: int) -> Ngrams:
        """Those of orders 2 to ``order`` alone."""
        return Ngrams(self.orders[: order - 1], self.ids[: order - 1])

    def of(self, order: int) -> Ngrams:
        """Those of one order alone."""
        return Ngrams((order,), self.ids[order - 2 : order - 1])


def number_ngrams(addressing: Addressing, tokens: _Ints, doc_starts: _Ints) -> Ngrams:
    """Number the n-grams of a text.

    ``tokens``: raw ids ``[T]``. ``doc_starts``: the index of each document's first token. Holds some ten integers a
    token. Raises ``ValueError`` for an id outside the vocabulary.
    """
    config, windows = addressing.config, text_windows(addressing, tokens, doc_starts).numpy()
    numbers, found, used = windows[:, 0], np.empty((len(config.orders), len(tokens)), np.int32), 0
    for place, order in enumerate(config.orders):
        # Numbering what is there before each step keeps the integers below T·V, which fits where V^n would not.
        distinct, numbers = np.unique(numbers * config.vocab_size + windows[:, order - 1], return_inverse=True)
        found[place] = numbers + used
        used += len(distinct)
    return Ngrams(config.orders, found)


def number_rows(addressing: Addressing, tokens: _Ints, doc_starts: _Ints) -> Ngrams:
    """Number the rows that each order's first head reads in the first layer: n-grams that collide share a number.

    Takes and raises what :func:`number_ngrams` does. Holds some twenty integers a token.
    """
    config, windows = addressing.config, text_windows(addressing, tokens, doc_starts)
    heads = config.per_order("heads")
    columns = [sum(heads[:place]) for place in range(len(heads))]
    rows = np.empty((len(columns), len(windows)), np.int64)
    for start in range(0, len(windows), _PIECE):
        piece = slice(start, start + _PIECE)
        rows[:, piece] = addressing.rows(windows[None, piece], config.layers[0])[1][0, :, columns].T
    numbers = np.unique(rows, return_inverse=True)[1]  # row ids are a layer's own, so no two orders share one
    return Ngrams(config.orders, numbers.reshape(rows.shape).astype(np.int32))


def text_windows(addressing: Addressing, tokens: _Ints, doc_starts: _Ints) -> torch.Tensor:
    """The canonical windows of a text: int64 ``[T, N]``."""
    starts = torch.zeros(1, len(tokens), dtype=torch.bool)
    starts[0, torch.from_numpy(np.array(doc_starts, np.int64))] = True
    ids = torch.from_numpy(np.array(tokens, np.int64))[None]
    return addressing.windows(ids, doc_start=starts)[0]


def ngrams_of_file(addressing: Addressing, file: TokenFile) -> Ngrams:
    """:func:`number_ngrams` of a tokenised corpus."""
    return number_ngrams(addressing, file.tokens, file.starts)


@dataclass(frozen=True)
class Steps:
    """How a text is read: what one step of a server holds."""

    tokens: int
    """Tokens of a step."""
    sequences: int = 1
    """Documents that are read side by side, one token of each after the other."""


WAYS = {"prefill": Steps(8192), "decode-1": Steps(1), "decode-512": Steps(512, 512)}
"""Ways of reading: chunks of 8,192 tokens, one document after the other; a token of one sequence, or of each of 512."""


@dataclass(frozen=True)
class Traffic:
    """What the measured part of a text asked for, and what of it each cache did not have, both in n-grams a token."""

    tokens: int
    asked: tuple[float, ...]
    """One number an order: distinct n-grams of a step."""
    fetched: tuple[tuple[float, ...], ...]
    """``[orders][caches]``: those of them that the cache of each size lacked."""

    def hit_rates(self, cache: int) -> tuple[float, ...]:
        """Of what a step asked for, the share found in cache number ``cache``, one number an order."""
        return tuple(1 - missed[cache] / asked for missed, asked in zip(self.fetched, self.asked, strict=True))


def traffic(ngrams: Ngrams, entry_bytes: Sequence[int], caches: Sequence[int], steps: Steps, warm: float) -> Traffic:
    """Read a text through an LRU cache of every size in ``caches`` (bytes), all at once.

    ``entry_bytes``: of an n-gram, one number an order. ``warm``: the share of the text, 0 to below 1, that is only read
    to fill the caches. Raises ``ValueError`` for a text too short to give every sequence a token.
    """
    length = ngrams.ids.shape[1]
    border = int(length * warm)
    parts = [_in_steps(border, steps), border + _in_steps(length - border, steps)]
    sequence, measured = np.concatenate(parts), len(parts[1])
    if not measured:
        raise ValueError(f"A text of {length:,} tokens is too short for {steps.sequences} sequences: give more text.")
    orders = len(ngrams.orders)
    keys = np.ascontiguousarray(ngrams.ids[:, sequence].T).reshape(-1)
    step = np.concatenate([np.arange(len(part), dtype=np.int32) // steps.tokens for part in parts])
    step[len(parts[0]) :] += step[len(parts[0]) - 1] + 1 if len(parts[0]) else 0
    needed = reuse_bytes(keys, np.tile(np.array(entry_bytes, np.int32), len(sequence)), np.repeat(step, orders))
    needed = needed.reshape(-1, orders)[-measured:]
    asked, fetched = [], []
    for column in needed.T:
        found = np.sort(column[column != AGAIN])
        asked.append(len(found) / measured)
        missed = len(found) - np.searchsorted(found, np.asarray(caches, np.int64), side="right")
        fetched.append(tuple((missed / measured).tolist()))
    return Traffic(measured, tuple(asked), tuple(fetched))


def _in_steps(tokens: int, steps: Steps) -> _Ints:
    """The places of so many tokens in the order of reading: sequences begin at even distances and are read together."""
    length = tokens // steps.sequences
    return np.arange(length * steps.sequences).reshape(steps.sequences, length).T.reshape(-1)


def static_hit_rate(ngrams: Ngrams, count: int, warm: float = 0.5) -> float:
    """The share of one order's accesses that the ``count`` most frequent n-grams of the first part have.

    ``warm``: the share of the text that is counted; the accesses are those of the rest.
    """
    (ids,) = ngrams.ids
    border = int(len(ids) * warm)
    counts = np.bincount(ids[:border], minlength=int(ids.max()) + 1)
    kept = np.zeros(len(counts), bool)
    kept[np.argpartition(-counts, min(count, len(counts) - 1))[:count]] = True
    kept &= counts > 0
    return float(kept[ids[border:]].mean())


def distinct_share(ngrams: Ngrams, window: int) -> float:
    """Distinct n-grams of one order in ``window`` tokens, a share of them: the mean over the windows of a text."""
    (ids,) = ngrams.ids
    both = np.sort(ids.astype(np.int64) << 31 | np.arange(len(ids)) // window)
    return float(1 - (both[1:] == both[:-1]).sum() / len(ids))
