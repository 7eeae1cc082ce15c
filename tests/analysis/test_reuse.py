"""What an LRU cache of any size hits, counted in one pass, against a dictionary that is such a cache."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.analysis import reuse


def lru(keys: list[int], sizes: list[int], steps: list[int], capacity: int) -> list[bool | None]:
    """Access by access: whether the cache had the key before the step; None where the step had asked already."""
    cache: OrderedDict[int, int] = OrderedDict()
    hits: list[bool | None] = []
    for step in sorted(set(steps)):
        own = [key for key, of in zip(keys, steps, strict=True) if of == step]
        hits += [None if key in own[:place] else key in cache for place, key in enumerate(own)]
        for key in own:
            cache.pop(key, None)
            cache[key] = sizes[key]
            while sum(cache.values()) > capacity:
                cache.popitem(last=False)
    return hits


streams = st.integers(1, 9).flatmap(
    lambda names: st.tuples(
        st.lists(st.tuples(st.integers(0, names - 1), st.integers(0, 2)), max_size=70),
        st.lists(st.integers(1, 5), min_size=names, max_size=names),
    )
)


@pytest.mark.parametrize("block_bits", [0, 3, 16])
@given(stream=streams, capacity=st.integers(0, 30))
def test_every_lru_cache_at_once(block_bits, stream, capacity):
    accesses, sizes = stream
    keys = np.array([key for key, _ in accesses], np.int64)
    steps = np.cumsum(np.array([later for _, later in accesses], np.int64))  # rising, with gaps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "_BLOCK_BITS", block_bits)
        needed = reuse.reuse_bytes(keys, np.array(sizes)[keys], steps)
    found = [None if need == reuse.AGAIN else bool(need <= capacity) for need in needed]
    assert found == lru(keys.tolist(), sizes, steps.tolist(), capacity)


@pytest.mark.parametrize("block_bits", [0, 2, 16])
@given(numbers=st.integers(0, 60).flatmap(lambda n: st.permutations(range(n))), seed=st.integers(0, 99))
def test_smaller_numbers_before(block_bits, numbers, seed):
    weights = np.random.default_rng(seed).integers(0, 9, len(numbers))
    expected = {
        number: sum(w for n, w in zip(numbers[:place], weights[:place], strict=True) if n < number)
        for place, number in enumerate(numbers)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "_BLOCK_BITS", block_bits)
        found = reuse.smaller_before(np.array(numbers, np.int64), weights.copy())
    assert found.tolist() == [expected[number] for number in range(len(numbers))]


def test_a_stream_of_many_blocks():
    """Past a block of numbers as it is: keys in a cycle need all of it, whatever stands in between."""
    keys = np.tile(np.arange(50_000), 4)
    needed = reuse.reuse_bytes(keys, np.full(len(keys), 3), np.arange(len(keys)))
    assert (needed[:50_000] == reuse.NEVER).all() and (needed[50_000:] == 150_000).all()
