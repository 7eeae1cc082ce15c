"""Where a memory's tables fit, and what a token's lookup then moves and takes: arithmetic, on rates that are named.

An n-gram is fetched whole: a row of every head in every layer. Per token, with ``asked`` distinct n-grams of a step and
``fetched`` those of them that the cache lacks:

    device    rows of all n-grams / gather rate of the GPU
    host      fetched bytes / gather rate of the host, or the bus where that is slower, and the device's time
    disk      fetched rows · components / reads a second, fetched bytes / bus, and the device's time

A step from the disk takes one read's latency at least. Nothing is taken to overlap with anything, launches and waits
are not counted. Without a GPU there is no bus; the host then gathers what a step asked for, and a cache lies in RAM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np

from torch_engram.addressing.layout import layouts
from torch_engram.analysis.charts import number
from torch_engram.analysis.hit_rates import WAYS, Ngrams, traffic
from torch_engram.analysis.machine import Machine
from torch_engram.config import EngramConfig
from torch_engram.stores.codecs import CODECS

PAGE = 4096
"""Bytes that a disk reads for a row."""


@dataclass(frozen=True)
class Tables:
    """What of a memory's configuration and its codec decides sizes."""

    config: EngramConfig
    codec: str

    @property
    def records(self) -> tuple[int, ...]:
        """Bytes of an encoded row, one number an order."""
        codec = CODECS[self.codec]
        return tuple(sum(part.nbytes for part in codec.components(dim)) for dim in self.config.per_order("row_dim"))

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows that an n-gram reads in all layers, one number an order."""
        return tuple(heads * len(self.config.layers) for heads in self.config.per_order("heads"))

    @property
    def entries(self) -> tuple[int, ...]:
        """Bytes of an n-gram in a cache, one number an order."""
        return tuple(rows * record for rows, record in zip(self.rows, self.records, strict=True))

    @property
    def components(self) -> int:
        """Tensors that a row lies in, each of which costs a read."""
        return len(CODECS[self.codec].components(1))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tables, without the rows that pad a layer."""
        heads = (zip(layout.primes, self.records, strict=True) for layout in layouts(self.config).values())
        return sum(sum(primes) * record for layer in heads for primes, record in layer)


@dataclass(frozen=True)
class Demand:
    """N-grams a token, one number an order: what a step asks for, and what of it the cache lacks."""

    step: int
    """Tokens of a step."""
    asked: tuple[float, ...]
    fetched: tuple[float, ...]

    @property
    def hit_rates(self) -> tuple[float, ...]:
        """Of what a step asks for, the share found in the cache."""
        return tuple(
            1 - missed / asked if asked else 0.0 for missed, asked in zip(self.fetched, self.asked, strict=True)
        )


def demands_of_text(ngrams: Ngrams, tables: Tables, cache: int) -> dict[str, Demand]:
    """What a text asks for, by way of reading: half of it fills a cache of so many bytes, the other half is counted.

    Raises ``ValueError`` for a text that is too short.
    """
    found = {name: traffic(ngrams, tables.entries, [cache], steps, 0.5) for name, steps in WAYS.items()}
    return {
        name: Demand(WAYS[name].tokens, one.asked, tuple(missed[0] for missed in one.fetched))
        for name, one in found.items()
    }


def demands_shipped(tables: Tables, cache: int) -> tuple[dict[str, Demand], str]:
    """The same from the curves that come with the library, between whose points logarithms are interpolated, and what
    text they are of. Raises ``ValueError`` for orders that they do not have."""
    curves = json.loads(files("torch_engram.analysis").joinpath("natural_text.json").read_text(encoding="utf-8"))
    highest = str(tables.config.max_ngram)
    if highest not in curves["orders_up_to"]:
        raise ValueError(f"No curve comes with orders up to {highest}: give --text and --tokenizer.")
    entries = sum(cache / entry for entry in tables.entries) / len(tables.entries)
    at, points = np.log1p(entries), np.log1p(curves["capacities"])
    found = {}
    for name, by_order in curves["orders_up_to"][highest].items():
        fetched = tuple(float(np.interp(at, points, missed)) for missed in by_order)
        found[name] = Demand(WAYS[name].tokens, tuple(missed[0] for missed in by_order), fetched)
    return found, f"{curves['text']}, {curves['tokenizer']} tokenizer"


@dataclass(frozen=True)
class Cost:
    """What a token moves in one way of reading, and what that takes."""

    bus_bytes: float
    disk_bytes: float
    disk_reads: float
    token_us: float
    """Microseconds a token."""
    step_us: float
    """Microseconds a step."""


@dataclass(frozen=True)
class Placement:
    """One placement on one machine."""

    name: str
    fits: bool
    why: str
    """What it takes and what there is, as a sentence."""
    costs: Mapping[str, Cost]
    """By way of reading."""


def placements(tables: Tables, cache: int, machine: Machine, demands: Mapping[str, Demand]) -> list[Placement]:
    """Device, host and disk, the fastest first."""
    cached = ("GPU memory", machine.hbm) if machine.hbm else ("RAM", machine.ram)
    front = [("a cache", cache, *cached)] if cache else []
    needs: dict[str, list[tuple[str, int, str, int | None]]] = {
        "device": [("tables", tables.nbytes, "GPU memory", machine.hbm)],
        "host": [("tables", tables.nbytes, "RAM", machine.ram), *(front if machine.hbm else [])],
        "disk": [("tables", tables.nbytes, "disk", machine.disk), *front],
    }
    return [
        Placement(
            name,
            all(free is None or size <= free for _, size, _, free in wanted),
            "; ".join(
                f"{what} of {gigabytes(size)} "
                + (f"in {gigabytes(free)} of {where}" if free is not None else "on a disk that has room")
                for what, size, where, free in wanted
            ),
            {way: cost(name, tables, machine, demand) for way, demand in demands.items()},
        )
        for name, wanted in needs.items()
    ]


def cost(name: str, tables: Tables, machine: Machine, demand: Demand) -> Cost:
    """What a token costs where its tables lie in ``device``, ``host`` or ``disk``. The formulas are this module's."""
    asked = _dot(demand.asked, tables.entries)
    missed = _dot(demand.fetched, tables.entries)
    has_gpu = machine.hbm > 0 or name == "device"
    seconds = sum(tables.entries) / machine.device_gather if has_gpu else asked / machine.host_gather
    bus, reads = missed if machine.hbm and name != "device" else 0.0, 0.0
    if name == "host":
        seconds += bus / min(machine.host_gather, machine.bus)
    if name == "disk":
        reads = _dot(demand.fetched, tables.rows) * tables.components
        waits = min(1.0, sum(demand.fetched) * demand.step) / demand.step  # steps that read at all, a token
        seconds += max(reads / machine.disk_iops, waits * machine.disk_latency)
        seconds += bus / machine.bus
    return Cost(bus, reads * PAGE, reads, 1e6 * seconds, 1e6 * seconds * demand.step)


def _dot(counts: Sequence[float], sizes: Sequence[int]) -> float:
    return float(sum(count * size for count, size in zip(counts, sizes, strict=True)))


def gigabytes(size: float) -> str:
    """A number of bytes for people."""
    return f"{number(size / 1e9)} GB"


def as_json(placement: Placement) -> dict[str, Any]:
    """The fields of a placement for programs."""
    costs = {way: vars(cost) for way, cost in placement.costs.items()}
    return {"placement": placement.name, "fits": placement.fits, "why": placement.why, "costs": costs}
