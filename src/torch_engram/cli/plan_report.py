"""What ``engram plan`` found, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console
    from rich.table import Table

    from torch_engram.analysis.machine import Machine
    from torch_engram.analysis.placement import Demand, Placement, Tables

MEASURED = "measured here"
"""Where a rate is from that --measure found."""


@dataclass(frozen=True)
class PlanReport:
    """Placements, and all that they follow from."""

    preset: str
    tables: Tables
    cache: int
    """Bytes."""
    machine: Machine
    origins: Mapping[str, str]
    """Where each number of the machine is from."""
    demands: Mapping[str, Demand]
    text: str
    """Whose demands they are."""
    placements: Sequence[Placement]

    def as_json(self) -> dict[str, Any]:
        """For programs, with every input."""
        from torch_engram.analysis.placement import as_json

        inputs = {
            "preset": self.preset, "codec": self.tables.codec, "record_bytes": self.tables.records,
            "table_bytes": self.tables.nbytes, "cache_bytes": self.cache, "text": self.text,
            "machine": vars(self.machine), "origins": self.origins,
        }  # fmt: skip
        per_token = {way: {**vars(demand), "hit_rates": demand.hit_rates} for way, demand in self.demands.items()}
        return {"inputs": inputs, "ngrams_a_token": per_token, "placements": [as_json(one) for one in self.placements]}

    def print(self, console: Console) -> None:
        """What is asked for, what it costs where, which placement to take, and what all of that rests on."""
        from torch_engram.analysis.placement import gigabytes

        sizes = " / ".join(str(size) for size in dict.fromkeys(self.tables.records))
        console.print(
            f"{self.preset} in {self.tables.codec}: tables of {gigabytes(self.tables.nbytes)}; a token reads "
            f"{sum(self.tables.rows)} rows of {sizes} bytes, {sum(self.tables.entries):,} bytes.",
            soft_wrap=True,
        )
        console.print(_demand_table(self.tables, self.demands))
        console.print(f"Cache: {gigabytes(self.cache)}. Text: {self.text}.\n", soft_wrap=True, markup=False)
        console.print(_cost_table(self.placements))
        for one in self.placements:
            console.print(f"{one.name} {'fits' if one.fits else 'does not fit'}: {one.why}.", soft_wrap=True)
        best = next((one.name for one in self.placements if one.fits), None)
        console.print(
            f"Place the tables on the {best}: of the placements that fit it comes first.\n" if best else
            "No placement fits: use a smaller --cache, another --codec, or a larger machine.\n",
            soft_wrap=True,
        )  # fmt: skip
        for line in _assumptions(self.machine, self.origins):
            console.print(line, soft_wrap=True, style="dim")


def _demand_table(tables: Tables, demands: Mapping[str, Demand]) -> Table:
    from rich.table import Table

    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("n-grams a token", "order", "asked for", "in the cache", "fetched"):
        shown.add_column(name, justify="left" if name == "n-grams a token" else "right")
    for way, demand in demands.items():
        rows = zip(tables.config.orders, demand.asked, demand.hit_rates, demand.fetched, strict=True)
        for place, (order, asked, rate, fetched) in enumerate(rows):
            shown.add_row("" if place else way, str(order), f"{asked:.3f}", f"{100 * rate:.1f} %", f"{fetched:.3f}")
    return shown


def _cost_table(found: Sequence[Placement]) -> Table:
    from rich.table import Table

    from torch_engram.analysis.charts import number

    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("placement", "", "bus, bytes/token", "disk, bytes/token", "µs/token", "µs/step"):
        shown.add_column(name, justify="left" if name in ("placement", "") else "right")
    for one in found:
        for place, (way, cost) in enumerate(one.costs.items()):
            moved = f"{cost.bus_bytes:,.0f}", f"{cost.disk_bytes:,.0f}"
            shown.add_row("" if place else one.name, way, *moved, number(cost.token_us), number(cost.step_us))
    return shown


def _assumptions(machine: Machine, origins: Mapping[str, str]) -> list[str]:
    """Every number of the machine by where it is from, and what the arithmetic leaves out."""
    from torch_engram.analysis.placement import gigabytes

    names = {"hbm": "GPU memory", "ram": "RAM", "disk_iops": "disk reads", "disk_latency": "one disk read"}
    shown = {"hbm": gigabytes(machine.hbm), "ram": gigabytes(machine.ram)}
    shown["disk"] = "that has room" if machine.disk is None else gigabytes(machine.disk)
    shown |= {name: f"{getattr(machine, name) / 1e9:,.4g} GB/s" for name in ("bus", "host_gather", "device_gather")}
    shown |= {"disk_iops": f"{machine.disk_iops:,.0f}/s", "disk_latency": f"{1e6 * machine.disk_latency:,.4g} µs"}
    lines = []
    for origin in dict.fromkeys(origins.values()):
        own = [f"{names.get(name, name.replace('_', ' '))} {shown[name]}" for name in shown if origins[name] == origin]
        lines.append(f"{origin[0].upper()}{origin[1:]}: {', '.join(own)}.")
    if MEASURED not in origins.values():
        lines.append("For the rates of this machine, add --measure.")
    return [
        *lines,
        "One LRU cache of all orders and layers, by n-gram, its keys not counted. A row costs the disk a read of 4 KiB "
        "for each tensor that it lies in; the page cache is not counted. Nothing overlaps; launches, waits and the "
        "memory that the model takes are not counted. docs/guide.md has the formulas.",
    ]
