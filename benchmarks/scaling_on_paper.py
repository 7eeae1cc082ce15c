"""Bytes and bandwidths of training over 1 to 512 GPUs, calculated and not measured: the tables of docs/scaling.md.

    python benchmarks/scaling_on_paper.py           # prints them
    python benchmarks/scaling_on_paper.py --write   # results/scaling-on-paper.csv, and the tables in docs/scaling.md

What is calculated, and from what, is in `scaling_model.py`.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from scaling_model import RESULTS, TABLES, Scale, Text, inputs, latest

ROOT = Path(__file__).parents[1]
CSV, PAGE = RESULTS / "scaling-on-paper.csv", ROOT / "docs" / "scaling.md"
GPUS = (1, 2, 8, 64, 512)


def scales() -> list[Scale]:
    """One a number of GPUs."""
    given = {name: one.value for name, one in inputs().items()}
    text = Text(given)
    return [Scale(gpus, given, text) for gpus in GPUS]


def rows_of_csv(every: Iterable[Scale]) -> list[list[str]]:
    """All that is calculated: GPUs, case, value, unit."""
    found: list[tuple[int, str, float, str]] = []
    for one in every:

        def note(case: str, value: float, unit: str, gpus: int = one.gpus) -> None:
            found.append((gpus, case, value, unit))

        step = one.given["step"]
        note("tokens", one.given["tokens"] * one.gpus, "tokens")
        note("rows-held", one.given["rows"] * one.gpus, "rows")
        note("node-bytes", one.node_bytes, "bytes")
        note("distinct-read", one.read, "rows")
        note("distinct-owned", one.owned, "rows")
        note("changed-since", one.changed, "share")
        for part in ("id", "value", "gradient"):
            note(f"{part}-bytes", one.exchanged(part), "bytes")
        note("message", one.given["value"] * one.read / TABLES / one.gpus, "bytes")
        note("host-bytes-each-way", one.given["record"] * one.owned, "bytes")
        note("backbone-bytes", one.backbone, "bytes")
        for name, (took, allowed) in one.resources().items():
            note(f"time: {name}", took, "ms")
            note(f"share: {name}", took / step, "share")
            note(f"binds: {name}", took / allowed, "ms a step")
        for name, rate in one.needs().items():
            note(f"needed: {name}", rate, "GB/s")
        for name, took in one.mends().items():
            note(f"exposed: {name}", took / step, "share")
    return [[str(gpus), case, f"{value:.6g}", unit] for gpus, case, value, unit in found]


def write_csv(rows: Iterable[list[str]]) -> None:
    """The CSV of what was calculated."""
    with open(CSV, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("gpus", "case", "value", "unit"))
        writer.writerows(rows)


Values = dict[str, dict[int, float]]
"""By case and GPUs."""


def read_csv() -> Values:
    """What the CSV says."""
    found: Values = {}
    with open(CSV, newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["case"], {})[int(row["gpus"])] = float(row["value"])
    return found


BYTES = {
    "tokens": ("tokens a step, all GPUs", 1e6, "M"),
    "rows-held": ("rows in all tables", 1e9, "G"),
    "node-bytes": ("records in a node's host memory", 1e9, "GB"),
    "distinct-read": ("distinct rows that a GPU reads", 1e6, "M"),
    "distinct-owned": ("distinct rows that it holds and anybody reads", 1e6, "M"),
    "id-bytes": ("ids to other GPUs", 1e6, "MB"),
    "value-bytes": ("rows to other GPUs", 1e6, "MB"),
    "gradient-bytes": ("row gradients to other GPUs", 1e6, "MB"),
    "message": ("rows of one table to one GPU", 1e6, "MB"),
    "host-bytes-each-way": ("records out of host memory, and as much into it", 1e6, "MB"),
    "backbone-bytes": ("FSDP2: parameters and gradients", 1e6, "MB"),
}
"""Cases of the first table: what they are, and in what they are told."""


def checked(values: Values) -> list[list[str]]:
    """What is calculated for one and two GPUs beside what runs on them measured: what it is, both, and the claim."""
    one, exchange, exposed, two = (
        latest(claim) for claim in ("host-table-step", "exchange-bytes", "exposed-exchange", "two-gpu-scaling")
    )
    waited, step = values["time: rows and gradients, NVLink"][2], two["step-alone"]
    sent = sum(values[f"{part}-bytes"][2] for part in ("id", "value", "gradient"))
    return [
        [
            f"{gpus} GPU{'s' if gpus > 1 else ''}: {what}",
            f"{number(calculated)} {unit}",
            f"{number(found)} {unit}",
            claim,
        ]
        for gpus, what, calculated, found, unit, claim in (
            (1, "records over the host's bus, alone", values["time: host bus"][1],
             one["fetch-alone"] + one["write-alone"], "ms", "host-table-step"),
            (1, "what of it a step shows", 0.0,
             one["step-largest"] - one["step-10M-rows-in-HBM"], "ms", "host-table-step"),
            (2, "ids, rows and gradients to the other", sent / 1e6, exchange["sent"], "MB", "exchange-bytes"),
            (2, "rows and gradients over NVLink", waited, two["step-divided"] - two["step-unsent"], "ms",
             "two-gpu-scaling"),
            (2, "exposed exchange", 100 * waited / step, 100 * exposed["divided"], "% of the step", "exposed-exchange"),
            (2, "tokens a second over one GPU's", 2 * step / (step + waited), two["two-over-one"], "times",
             "two-gpu-scaling"),
        )
    ]  # fmt: skip


def tables() -> dict[str, str]:
    """The page's tables by the name of their place."""
    values = read_csv()
    head = ["", *(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS)]

    def of(prefix: str, scale: float, unit: str) -> list[list[str]]:
        cases = {case.removeprefix(prefix): case for case in values if case.startswith(prefix)}
        return [[name, *cells(values[case], GPUS, scale, unit)] for name, case in cases.items()]

    given = [[one.what, number(one.value), one.unit, one.source] for one in inputs().values()]
    in_bytes = [[what, *cells(values[case], GPUS, scale, unit)] for case, (what, scale, unit) in BYTES.items()]
    return {
        "inputs": table(["what", "value", "unit", "source"], given),
        "bytes": table(head, in_bytes),
        "times": table(head, of("time: ", 1.0, "ms")),
        "binding": table(head, [*of("binds: ", 1.0, "ms"), first_to_bind(values)]),
        "needs": table(head, of("needed: ", 1.0, "GB/s")),
        "mends": table(head, of("exposed: ", 0.01, "%")),
        "checked": table(["", "calculated", "measured", "claim"], checked(values)),
    }


def first_to_bind(values: Values) -> list[str]:
    """For every number of GPUs the resource that asks for the longest step."""
    found = ["**binds first**"]
    for gpus in GPUS:
        steps = {case: by[gpus] for case, by in values.items() if case.startswith("binds: ") and gpus in by}
        found.append(max(steps, key=steps.__getitem__).removeprefix("binds: "))
    return found


def cells(by_gpus: Mapping[int, float], columns: Iterable[int], scale: float, unit: str) -> list[str]:
    """One text a column; none where there is nothing."""
    return [f"{number(by_gpus[gpus] / scale)} {unit}" if by_gpus.get(gpus) else "" for gpus in columns]


def number(value: float) -> str:
    """Three significant digits, more before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """As Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(text: str) -> str:
    """``text`` with every table in its place."""
    for name, made in tables().items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        assert text.count(begin) == text.count(end) == 1, f"the page needs {begin} and {end} once each"
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{made}\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="the CSV and the page's tables")
    if parser.parse_args().write:
        write_csv(rows_of_csv(scales()))
        PAGE.write_text(page(PAGE.read_text()))
    for row in rows_of_csv(scales()):
        print(*row, sep=",")


if __name__ == "__main__":
    main()
