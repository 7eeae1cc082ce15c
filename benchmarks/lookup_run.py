"""What the measurements of host_lookup_gpu.py share: their sizes, text that is read once, and how results are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sparse_tables import store_of
from torch import Tensor

from torch_engram.bench.cache_hits import Counts, Hits
from torch_engram.bench.lookups import rows_asked
from torch_engram.bench.results import Measurement
from torch_engram.data import TokenFile
from torch_engram.memory import MemoryBank, Tokens


@dataclass(frozen=True)
class Sizes:
    """What is measured; by default what the claims say."""

    gigabytes: float = 64.0
    cache: str = "8GB"
    warm: int = 0
    """Tokens that fill the cache; 0 for half of the text."""
    chunk: int = 8192
    turns: int = 8
    alone: int = 24
    """Chunks that are timed one at a time."""
    sequences: int = 512
    steps: int = 600
    steps_of_one: int = 2000
    general_steps: int = 250
    """Of the general path, beside each way of decoding."""


class FreshText:
    """Stretches of a text, one after the other: nothing is taken twice."""

    def __init__(self, file: TokenFile):
        self._file, self._at = file, 0

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """Ids int64 and document starts of the next tokens, both ``[count]``. Raises ``ValueError`` where the text ends
        before."""
        first, last = self._at, self._at + count
        if last > len(self._file):
            raise ValueError(f"The text has {len(self._file):,} tokens, fewer than are read: give a longer one.")
        self._at, starts = last, torch.zeros(count, dtype=torch.bool)
        begin, end = np.searchsorted(self._file.starts, (first, last))
        starts[torch.from_numpy(self._file.starts[begin:end] - first)] = True
        return torch.from_numpy(self._file.tokens[first:last].astype(np.int64)), starts

    def chunks(self, count: int, length: int) -> Iterator[Tokens]:
        """One sequence that goes on. What a chunk's first tokens follow is not told: a history would have to wait."""
        for _ in range(count):
            ids, starts = self.take(length)
            yield Tokens(ids[None], doc_start=starts[None])

    def places(self, sequences: int, length: int) -> Tensor:
        """Ids ``[sequences, length]`` from so many places."""
        return self.take(sequences * length)[0].view(sequences, length)

    def next_document(self) -> None:
        """Go on with a document of which nothing was taken."""
        later = int(np.searchsorted(self._file.starts, self._at))
        self._at = int(self._file.starts[later]) if later < len(self._file.starts) else len(self._file)


@dataclass(frozen=True)
class Run:
    """One bank and one text. ``write``: as ``record()`` of record.py."""

    bank: MemoryBank
    text: FreshText
    sizes: Sizes
    write: Callable[..., None]

    @property
    def on_gpu(self) -> bool:
        """Whether there is a bus."""
        return self.bank.device.type == "cuda"

    def delivered(self, tokens: float) -> float:
        """GB that so many tokens are given: the bytes of all their rows, as files have them."""
        fields = store_of(self.bank).layout.fields
        return rows_asked(self.bank, 1) * tokens * sum(field.component.nbytes for field in fields) / 1e9

    def write_hits(self, claim: str, name: str, before: Counts, steps: int, unit: str) -> None:
        """Shares of n-grams that the cache had since ``before``, and the bytes, as they lie in memory, of the rows that
        it lacked: of one of ``steps``."""
        after, heads = self.bank.cache_counts(), self.bank.config.per_order("heads")
        hits = Hits.between(before, after)
        assert hits is not None, "the bank has a cache"
        for one in hits.measurements():
            self.write(claim, f"{name}-{one.case}", one.samples, one.unit)
        rows = sum(
            (counts["misses"] - before[layer, order]["misses"]) * heads[order - 2]
            for (layer, order), counts in after.items()
        )
        self.write(claim, f"{name}-fetched", [rows * store_of(self.bank).layout.nbytes / steps], unit)

    def wait(self) -> None:
        """For what the current stream was given."""
        if self.on_gpu:
            torch.cuda.current_stream().synchronize()

    def wait_for_all(self) -> None:
        """For the whole device."""
        if self.on_gpu:
            torch.cuda.synchronize()


def show(
    claim: str,
    case: str,
    samples: list[float],
    unit: str,
    *,
    reference: float | None = None,
    ratio: float | None = None,
) -> None:
    """In place of ``record()``, where nothing is to be recorded."""
    p20, p50, p80 = Measurement(case, samples, unit).quantiles
    print(
        f"(not recorded) {claim} {case}: {p50:.6g} {unit} (p20 {p20:.6g}, p80 {p80:.6g}, n {len(samples)})", flush=True
    )
