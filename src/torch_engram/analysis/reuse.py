"""How far apart the uses of a key lie in a stream, and so what every LRU cache would hit, in one pass.

An access is a hit in an LRU cache exactly when the entries used since its key's last access, its own included, fit
(their number is the stack distance of Mattson et al., 1970). A stream is read in steps, as a server reads it: a step
asks for each of its keys once, before any of them enters the cache.

With ``last`` an access's previous one, the keys used between ``last[i]`` and the step of i are those accesses j before
that step with ``last[j] < last[i]``, less the ``last[i] + 1`` accesses up to it, all of which count themselves. That is
a count of earlier smaller numbers, found for all at once by splitting numbers by their bits, highest first: n log n
operations on whole arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NEVER = np.iinfo(np.int64).max
"""The distance of a key's first access: no cache has it."""
AGAIN = -1
"""That of a key that its step has already asked for."""

_BITS = 31  # of a place, a key or a step
_MASK = 2**_BITS - 1
_BLOCK_BITS = 16  # numbers of a block, with all that is made of them, stay in a core's cache

_Ints = np.ndarray[Any, np.dtype[Any]]


def reuse_bytes(keys: _Ints, sizes: _Ints, steps: _Ints) -> _Ints:
    """Bytes that an LRU cache needs for each access to be a hit: int64 ``[n]``, with :data:`NEVER` and :data:`AGAIN`.

    ``keys``: int ``[n]`` from 0 to below 2**31, those of one stream in the order of use. ``sizes``: int ``[n]``, the
    bytes of each access's entry, one number a key. ``steps``: int ``[n]``, rising: each access's step. What a step has
    used is recent in the order of its last uses. Raises ``ValueError`` for 2**31 accesses or more.
    """
    if len(keys) >= 2**31:
        raise ValueError(f"A stream of {len(keys):,} accesses is too long: count over a part of it.")
    if not len(keys):
        return np.zeros(0, np.int64)
    by_key, order = _sorted_with_places(keys)
    by_step = steps[order]
    known = np.zeros(len(keys), bool)
    known[1:] = by_key[1:] == by_key[:-1]
    again = known.copy()
    again[1:] &= by_step[1:] == by_step[:-1]
    del by_key, by_step
    begins = np.flatnonzero(~again)  # of every use: a key within a step
    first, final, known = order[begins], order[np.append(begins[1:], len(order)) - 1], known[begins]
    del order, again, begins

    recency = np.sort(final)  # from here on, uses are numbered by their last access
    numbers = np.empty(len(keys), np.int32)
    numbers[recency] = np.arange(len(recency), dtype=np.int32)
    place = numbers[final]
    last = np.empty_like(place)
    last[place] = np.where(known, np.roll(place, 1), -1)
    asked = np.empty_like(first)
    asked[place] = first
    del first, final, known, numbers, place
    found = np.full(len(keys), AGAIN, np.int64)
    found[asked] = _between(last, sizes[recency].astype(np.int64), steps[recency].astype(np.int64))
    return found


def _between(last: _Ints, size: _Ints, step: _Ints) -> _Ints:
    """What the keys used between each use and the ``last`` one of its key take, and its own: int64 ``[uses]``.

    ``last``: the number of that use, -1 at the first.
    """
    found = np.full(len(last), NEVER, np.int64)
    again = np.flatnonzero(last >= 0)
    marks = np.zeros(len(last), bool)
    marks[last[again]] = True
    ranks = np.cumsum(marks, dtype=np.int32) - 1
    # Within a step from the most to the least recent, no number has a smaller one of its own step before it.
    sequence = _MASK - (np.sort(step[again] << _BITS | _MASK - last[again]) & _MASK)
    smaller = smaller_before(ranks[sequence], size[sequence])
    del sequence
    needed = smaller[ranks[last[again]]]
    del smaller, ranks, marks
    new_before = np.cumsum(np.where(last < 0, size, 0))
    new_before = np.concatenate(([0], new_before))[_step_begins(step)]
    needed += new_before[again]
    needed -= np.cumsum(size)[last[again]]
    found[again] = needed + size[again]
    return found


def _sorted_with_places(keys: _Ints) -> tuple[_Ints, _Ints]:
    """Keys sorted, and the place of each, equal ones in their order. One integer that holds both sorts quickest."""
    both = np.sort(keys.astype(np.int64) << _BITS | np.arange(len(keys)))
    return both >> _BITS, (both & _MASK).astype(np.int32)


def _step_begins(step: _Ints) -> _Ints:
    """Where the step of each use begins."""
    begins = np.zeros(len(step), np.int64)
    begins[1:] = np.where(step[1:] != step[:-1], np.arange(1, len(step)), 0)
    return np.maximum.accumulate(begins)


def smaller_before(numbers: _Ints, weights: _Ints) -> _Ints:
    """The summed weights of the smaller numbers that stand before each number, int64 ``[n]``, by number.

    ``numbers``: a permutation of 0..n-1; ``weights``: int64 ``[n]``, one a place. Both are overwritten.
    """
    sums, n = np.zeros(len(numbers), np.int64), len(numbers)
    bits = max(0, n - 1).bit_length()
    for bit in reversed(range(_BLOCK_BITS, bits)):
        # Numbers that agree above this bit stand together, each group where its numbers will be when all are sorted.
        for start in range(0, n, 2 << bit):
            group = slice(start, start + (2 << bit))
            _split(numbers[group], weights[group], sums[group], bit)
    for start in range(0, n, 1 << _BLOCK_BITS):
        block = slice(start, start + (1 << _BLOCK_BITS))
        sums[block] = _sort_block(numbers[block], weights[block], sums[block], min(bits, _BLOCK_BITS))
    return sums


def _split(numbers: _Ints, weights: _Ints, sums: _Ints, bit: int) -> None:
    """One group in place: numbers with the bit get the weights of those without that stand before, and go behind."""
    high = (numbers >> bit) & 1
    sums += np.cumsum(weights * (1 - high)) * high
    order = np.concatenate((np.flatnonzero(high == 0), np.flatnonzero(high)))
    for values in (numbers, weights, sums):
        values[:] = values[order]


def _sort_block(numbers: _Ints, weights: _Ints, sums: _Ints, bits: int) -> _Ints:
    """The sums of a block of ``2**bits`` numbers, or of fewer at the end, all groups of a bit at once."""
    for bit in reversed(range(bits)):
        half, group = 1 << bit, 2 << bit
        high = (numbers >> bit) & 1
        running = np.cumsum(weights * (1 - high))
        before = np.concatenate(([0], running[group - 1 :: group]))  # each group
        sums = sums + high * (running - np.repeat(before, group)[: len(sums)])
        lows, highs = np.flatnonzero(high == 0), np.flatnonzero(high)
        whole = len(numbers) // group * half  # of either kind in groups that are not cut short
        pairs = np.stack((lows[:whole].reshape(-1, half), highs[:whole].reshape(-1, half)), axis=1)
        order = np.concatenate((pairs.reshape(-1), lows[whole:], highs[whole:]))
        numbers, weights, sums = numbers[order], weights[order], sums[order]
    return sums
