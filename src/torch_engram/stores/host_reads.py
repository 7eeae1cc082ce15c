"""Rows of a table in host memory to a GPU, by two ways at once: staged, and read by the GPU itself.

Staged, the CPU gathers rows into pinned memory and the copy engine moves them. The GPU's own reads need no CPU, but
where the table's pages are small they take as long for a row at a random place, however short, as for many times its
bytes: they are quicker for few rows, and of many they take a share. Where pages are large the bus is what either way
waits for, and the GPU does better alone. Which it is, and how a batch is divided, is measured when the first rows are
asked for.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_engram.stores.host_asks import SHARES, HostAsk
from torch_engram.stores.records import make_keys
from torch_engram.stores.staging import Staging
from torch_engram.stores.table import RecordTable

_SIZES = (1 << 11, 1 << 16)
"""Rows of the fetches that are measured: what decoding and prefill miss lies between."""
_MOST_SECONDS, _MOST_ROUNDS = 0.05, 200
"""How long one of them is repeated: processors that were idle are slow at first."""
_PAUSES = (0.002, 0.0)
"""Before each: while a model decodes, the threads that gather fall asleep, and have to be woken for every step."""
_GAIN = 1.25
"""How much quicker than the GPU alone both ways have to be: the CPU's wants its cores, and somebody who waits."""
ALL = (1 << 40, 0)
"""The division of batches that the GPU reads alone."""


Way = Callable[[HostAsk, Tensor], float]
"""Fetches keys and says how long it took."""


class HostReads:
    """Both ways for one GPU. Where it cannot reach the table's memory all rows are staged, with a warning."""

    def __init__(self, table: RecordTable, device: torch.device):
        self.table, self.device = table, device
        self.staging = Staging(device, table.layout.nbytes)
        self.bases = table.bases.to(device)
        self.rows = torch.tensor([table.spaces.get(space, 0) for space in range(max(table.spaces) + 1)], device=device)
        """Of every space, 0 for one that is not there."""
        self.beside = torch.cuda.Stream(device) if device.type == "cuda" else None
        """For the GPU's own reads."""
        self.words: Tensor | None
        """The table int64 ``[rows, nbytes / 8]`` as the GPU reaches it; None where it does not."""
        self.marks: Tensor | None
        """Its marks of written rows uint8 ``[rows]``, where it has any that the GPU reaches."""
        self.words, self.marks = _reachable(table, device) or (None, None)
        self.records = table.records if self.words is None else self.words.view(torch.uint8)
        """The table as the CPU gathers from it: where it is pinned, since that may have moved pages, and another map of
        them looks each up anew."""
        self._division = self._measure_division()

    def new_ask(self, capacity: int) -> HostAsk:
        """An ask that serves for long: how its batches are best divided is measured anew, in a quarter of a second,
        unless the GPU does best alone."""
        return HostAsk(self, capacity, self._division if self._division == ALL else self._measure_division())

    def fetch(self, keys: Tensor) -> Tensor:
        """Records uint8 ``[U, nbytes]`` of keys ``[U]`` on the GPU. Raises ``ValueError`` naming a row or a space that
        is not there."""
        ask = HostAsk(self, len(keys), self._division)
        ask.send(keys.contiguous(), torch.full((2,), len(keys), device=self.device))
        ask.sent()
        with ask.beside():
            ask.read()
        records = ask.bring()
        if ask.alone and self.device.type == "cuda":  # only then it knows of rows that are not there
            torch.cuda.current_stream(self.device).synchronize()
        ask.check()
        return records

    def _measure_division(self) -> tuple[int, int]:
        """How a :class:`HostAsk` is to divide its batches."""
        if self.words is None:
            return 0, 0
        generator = torch.Generator().manual_seed(0)  # a user's random numbers are left alone
        by_gpu, by_cpu = (
            [self._seconds(way, each, division, generator) for each in zip(_SIZES, _PAUSES, strict=True)]
            for way, division in ((_gpu_seconds, ALL), (_whole_seconds, (0, 0)))
        )
        division = divide(_SIZES, by_gpu, by_cpu)
        both = self._seconds(_whole_seconds, (_SIZES[-1], _PAUSES[-1]), division, generator)
        return ALL if by_gpu[-1] <= _GAIN * both else division

    def _seconds(
        self, way: Way, fetches: tuple[int, float], division: tuple[int, int], generator: torch.Generator
    ) -> float:
        """What a way takes for so many random rows, each time after a pause."""
        size, pause = fetches
        ask, times = HostAsk(self, size, division), list[float]()
        end = time.perf_counter() + _MOST_SECONDS
        while len(times) < 3 or (len(times) < _MOST_ROUNDS and time.perf_counter() < end):
            keys = self._random_keys(size, generator)
            time.sleep(pause)
            times.append(way(ask, keys))
        return statistics.median(times[len(times) // 2 :])

    def _random_keys(self, size: int, generator: torch.Generator) -> Tensor:
        space, rows = max(self.table.spaces.items(), key=lambda found: found[1])
        return make_keys(space, torch.randint(rows, (size,), generator=generator)).to(self.device)


def divide(sizes: Sequence[int], by_gpu: Sequence[float], by_cpu: Sequence[float]) -> tuple[int, int]:
    """How a batch is divided so that both take equally long: how many rows the GPU reads while the CPU is getting
    ready, and which share of the batch besides, of :data:`SHARES`.

    From what either takes alone for two ``sizes``: something, and something more for every row.
    """
    (gpu, gpu_row), (cpu, cpu_row) = (_line(sizes, took) for took in (by_gpu, by_cpu))
    both = gpu_row + cpu_row
    return max(0, round((cpu - gpu) / both)), round(SHARES * cpu_row / both)


def _line(sizes: Sequence[int], took: Sequence[float]) -> tuple[float, float]:
    """What it takes, and what a row takes more."""
    row = max((took[1] - took[0]) / (sizes[1] - sizes[0]), 1e-12)
    return took[0] - row * sizes[0], row


def _asked(ask: HostAsk, keys: Tensor) -> None:
    ask.send(keys, torch.full((2,), len(keys), device=keys.device))
    ask.sent()
    torch.cuda.current_stream().synchronize()  # and not the device, where somebody may be recording a graph


def _gpu_seconds(ask: HostAsk, keys: Tensor) -> float:
    _asked(ask, keys)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    ask.read()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _whole_seconds(ask: HostAsk, keys: Tensor) -> float:
    _asked(ask, keys)
    begun = time.perf_counter()
    with ask.beside():
        ask.read()
    ask.bring()
    torch.cuda.current_stream().synchronize()
    return time.perf_counter() - begun


def _reachable(table: RecordTable, device: torch.device) -> tuple[Tensor, Tensor | None] | None:
    """The table's words and marks as kernels reach them."""
    try:
        return table.reach(device)
    except (RuntimeError, MemoryError) as error:
        warnings.warn(f"The table cannot be pinned ({error}): the CPU gathers all its rows.", stacklevel=4)
        return None
