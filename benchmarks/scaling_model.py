"""What one GPU of many moves in a training step with tables divided over ranks: a calculation, and no measurement.

The design is that of memory/exchange.py, memory/sharded_rows.py and stores/shard.py. Every rank deduplicates what it
reads, asks the owners for each row once by an id of 8 bytes, gets it as it is stored, and sends its gradient back once
in fp32. An owner reads each record that anybody asked for once, and writes it once. All that this begins with is in
:func:`inputs`, each number with where it comes from; the measured ones are read from the CSVs of this repository.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NODE = 8
"""GPUs that NVLink joins."""
ORDERS, TABLES = (2, 3), 2
WINDOWS = (256, 8192, 65536)


@dataclass(frozen=True)
class Input:
    """A number that the calculation begins with."""

    what: str
    value: float
    unit: str
    source: str


def inputs() -> dict[str, Input]:
    """All of them, by name."""

    def measured(what: str, unit: str, claim: str, case: str, scale: float = 1.0) -> Input:
        return Input(what, latest(claim)[case] * scale, unit, f"measured: `{claim}.csv`, {case}")

    text = {
        f"distinct-{order}-{window}": measured(
            f"distinct {order}-grams within {window:,} tokens", "share", "hit-rates",
            f"order-{order}-distinct-in-{window}",
        )
        for order in ORDERS
        for window in WINDOWS
    }  # fmt: skip
    run = "host-table-step"
    return {
        "tokens": Input("tokens a GPU and step", 262_144, "tokens", "`host_table_gpu.py`: 4 micro-batches of 65,536"),
        "parameters": Input("parameters of the network", 153_390_336, "", "counted: the model of `host_table_gpu.py`"),
        "value": Input("a row's value, bf16", 128, "bytes", "64 numbers, as they cross and are stored"),
        "gradient": Input("a row's gradient, fp32", 256, "bytes", "64 numbers"),
        "id": Input("a row's id", 8, "bytes", "int64"),
        "record": Input("a record: value, count, row-wise moment", 144, "bytes", "`RecordLayout`, padded"),
        "rows": measured("rows a GPU holds", "rows", run, "rows", 1e6),
        "step": measured("step with a small table in HBM", "ms", run, "step-10M-rows-in-HBM"),
        "distinct": measured("distinct rows that such a step reads", "rows", run, "distinct-rows"),
        "fetch": measured("records out of host memory", "GB/s", run, "fetch-alone-rate"),
        "write": measured("records into host memory", "GB/s", run, "write-alone-rate"),
        **text,
        "nvlink": Input("NVLink, one way", 450, "GB/s", "published: H100 and H200 SXM, 900 GB/s both ways"),
        "network": Input("InfiniBand, one way, a GPU", 50, "GB/s", "published: NDR, 400 Gb/s, one adapter a GPU"),
        "capacity": Input("host memory of a node, in all", 2000, "GB", "published: DGX H100, 2 TB"),
        "memory": Input("host memory of a node, its rate", 614, "GB/s", "published: 2 sockets of 8 channels DDR5-4800"),
        "exposed": Input("exposed exchange that is allowed", 0.03, "of the step", "the project's goal"),
    }


def latest(claim: str) -> dict[str, float]:
    """The last value of each of a claim's cases."""
    with open(RESULTS / f"{claim}.csv", newline="") as file:
        return {row["case"]: float(row["value"]) for row in csv.DictReader(file)}


class Text:
    """How many distinct rows some tokens of text read: the measured curves of two orders, at the level that a step of
    the measured run has. Beyond the last window each curve goes on with the slope that it ended with."""

    def __init__(self, given: Mapping[str, float]):
        self._shares = {o: [given[f"distinct-{o}-{window}"] for window in WINDOWS] for o in ORDERS}
        self._level = given["distinct"] / self._ngrams(given["tokens"])

    def share(self, order: int, tokens: float) -> float:
        """Distinct n-grams over tokens: straight lines between the windows, both axes logarithmic."""
        shares = self._shares[order]
        last = next((i for i, window in enumerate(WINDOWS) if window >= tokens and i), len(WINDOWS) - 1)
        low, high = (math.log(WINDOWS[i]) for i in (last - 1, last))
        slope = math.log(shares[last] / shares[last - 1]) / (high - low)
        return shares[last] * math.exp(slope * (math.log(tokens) - high))

    def _ngrams(self, tokens: float) -> float:
        return sum(tokens * self.share(order, tokens) for order in ORDERS)

    def rows(self, tokens: float) -> float:
        """Distinct rows of all tables. Tables grow with the GPUs, so collisions are as rare as they were."""
        return self._level * self._ngrams(tokens)


@dataclass(frozen=True)
class Scale:
    """What one GPU of so many does in a step. Bytes are those of one direction; the other has as many."""

    gpus: int
    given: Mapping[str, float]
    text: Text

    @property
    def read(self) -> float:
        """Distinct rows that it reads: what it asks for, and what all others ask of it, too."""
        return self.text.rows(self.given["tokens"])

    @property
    def owned(self) -> float:
        """Distinct rows that anybody asks it for, which it reads and writes."""
        return self.text.rows(self.given["tokens"] * self.gpus) / self.gpus

    @property
    def node_bytes(self) -> float:
        """What a node's GPUs hold in its memory."""
        return self.given["rows"] * self.given["record"] * min(self.gpus, NODE)

    @property
    def off_rank(self) -> float:
        """Share of its rows that another GPU holds."""
        return 1 - 1 / self.gpus

    @property
    def off_node(self) -> float:
        """Share of its rows that another node holds."""
        return max(0.0, 1 - NODE / self.gpus)

    def exchanged(self, *parts: str) -> float:
        """Bytes of these parts of every row that leave the GPU."""
        return sum(self.given[part] for part in parts) * self.read * self.off_rank

    @property
    def backbone(self) -> float:
        """FSDP2's bytes: fp32 parameters gathered and their gradients scattered, both once a step."""
        return 4 * self.given["parameters"] * 2 * self.off_rank

    def milliseconds(self, count: float, rate: str) -> float:
        """Of so many bytes."""
        return 1e3 * count / (self.given[rate] * 1e9)

    def swap(self, count: float) -> float:
        """Milliseconds in which bytes a row go to the rows' ranks, within the node and to others at the same time."""
        within = count * self.read * (self.off_rank - self.off_node)
        beyond = count * self.read * self.off_node
        return max(self.milliseconds(within, "nvlink"), self.milliseconds(beyond, "network"))

    def node_first(self, count: float) -> float:
        """The same where a node's GPUs first collect what they ask for, each row at one of them, and it alone goes on:
        one after the other."""
        if not self.off_node:
            return self.swap(count)
        once = self.text.rows(NODE * self.given["tokens"]) / NODE
        collected = count * self.read * (1 - 1 / NODE)
        return self.milliseconds(collected, "nvlink") + self.milliseconds(count * once * self.off_node, "network")

    @property
    def changed(self) -> float:
        """Share of the rows that it reads which the step before has changed, anywhere."""
        before, tokens = self.given["tokens"] * self.gpus, self.given["tokens"]
        return 1 - (self.text.rows(before + tokens) - self.text.rows(before)) / self.read

    def resources(self) -> dict[str, tuple[float, float]]:
        """By resource, milliseconds a step and the share of the step that they may take: all of it where it is busy
        beside the network, the goal's where the network waits. The host's bus reads and writes one after the other."""
        records, exchange = self.given["record"] * self.owned, self.given["value"] + self.given["gradient"]
        nodes = self.off_node / NODE  # a ring passes a node's boundary once, over all its adapters
        whole = self.backbone / self.off_rank if self.gpus > 1 else 0.0
        host = self.milliseconds(records, "fetch") + self.milliseconds(records, "write")
        node = 2 * records * min(self.gpus, NODE)
        waits = "network" if self.off_node else "nvlink"
        return {
            "host bus": (host, 1.0),
            "host memory": (self.milliseconds(node, "memory"), 1.0),
            "FSDP2, NVLink": (self.milliseconds(self.backbone, "nvlink"), 1.0),
            "FSDP2, InfiniBand": (self.milliseconds(whole * nodes, "network"), 1.0),
            f"rows and gradients, {'InfiniBand' if waits == 'network' else 'NVLink'}": (
                self.swap(exchange), self.given["exposed"],
            ),
        }  # fmt: skip

    def needs(self) -> dict[str, float]:
        """GB/s of one direction of each link: all bytes spread over the step, and rows and gradients in the share of it
        that they may take."""
        step, whole = self.given["step"] / 1e3, self.backbone / self.off_rank if self.gpus > 1 else 0.0
        exchange = (self.given["value"] + self.given["gradient"]) * self.read
        ids, within = self.given["id"] * self.read, self.off_rank - self.off_node
        return {
            "host bus, reads": self.given["record"] * self.owned / step / 1e9,
            "NVLink, spread over the step": (self.backbone + (exchange + ids) * within) / step / 1e9,
            "NVLink, for the allowed exposure": exchange * within / step / self.given["exposed"] / 1e9,
            "InfiniBand, spread over the step": (whole / NODE + exchange + ids) * self.off_node / step / 1e9,
            "InfiniBand, for the allowed exposure": exchange * self.off_node / step / self.given["exposed"] / 1e9,
        }

    def mends(self) -> dict[str, float]:
        """Milliseconds that rows and gradients take as they are, and with what could be changed."""
        value, gradient = self.given["value"], self.given["gradient"]
        early = self.changed * value
        return {
            "as it is": self.swap(value + gradient),
            "rows a step ahead, changed ones again": self.swap(early + gradient),
            "gradients in bf16": self.swap(value + gradient / 2),
            "once a node": self.node_first(value + gradient),
            "all three": self.node_first(early + gradient / 2),
        }
