"""What a cache in front of a table finds while lookups are timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch_engram.bench.results import Measurement

Counts = Mapping[tuple[int, int], Mapping[str, int]]
"""Of :meth:`~torch_engram.memory.MemoryBank.cache_counts`."""


@dataclass(frozen=True)
class Hits:
    """N-grams of some reads, all layers together, by order; one that a read wants at several tokens counts as often."""

    found: Mapping[int, int]
    """Those that were in the cache when the read began."""
    asked: Mapping[int, int]

    @classmethod
    def between(cls, before: Counts, after: Counts) -> Hits | None:
        """Of the reads between two counts of one bank; None for a bank without a cache."""
        found: Counter[int] = Counter()
        asked: Counter[int] = Counter()
        for (layer, order), counts in after.items():
            new = {name: count - before[layer, order][name] for name, count in counts.items()}
            found[order] += new["hits"]
            asked[order] += new["hits"] + new["repeats"] + new["misses"]
        return cls(found, asked) if asked else None

    @property
    def rates(self) -> dict[int, float]:
        """Share found, by order, lowest first."""
        return {order: self.found[order] / self.asked[order] for order in sorted(self.asked)}

    @property
    def together(self) -> float:
        """Share found of all orders."""
        return sum(self.found.values()) / sum(self.asked.values())

    def measurements(self) -> Iterator[Measurement]:
        """All orders together, then each."""
        yield Measurement("hits", [self.together], "of n-grams")
        for order, rate in self.rates.items():
            yield Measurement(f"hits-order-{order}", [rate], "of n-grams")
