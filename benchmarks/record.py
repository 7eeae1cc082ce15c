"""Where measurements go: one CSV a claim, one row a case and run, never edited by hand."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch

RESULTS = Path(__file__).parent / "results"
HEADER = (
    "claim", "case", "value", "unit", "reference", "ratio", "p20", "p50", "p80", "n",
    "device", "versions", "commit", "date",
)  # fmt: skip


def record(
    claim: str,
    case: str,
    samples: Sequence[float],
    unit: str,
    *,
    reference: float | None = None,
    ratio: float | None = None,
    device: str = "cpu",
) -> None:
    """Append a row whose value is the median of ``samples``. ``reference``, ``ratio``: what it was measured against in
    the same run."""
    p20, p50, p80 = quantiles(samples)
    values = [claim, case, p50, unit, reference, ratio, p20, p50, p80, len(samples)]
    shown = [f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value) for value in values]
    path = RESULTS / f"{claim}.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(HEADER)
        writer.writerow([*shown, device_name(device), versions(), commit(), datetime.date.today().isoformat()])
    print(f"{claim} {case}: {p50:.6g} {unit} (p20 {p20:.6g}, p80 {p80:.6g}, n {len(samples)})")


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, interpolated; of one sample, that sample."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def device_name(device: str) -> str:
    """The CPU's model and the number of cores that this process may use, or the GPU's name."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model.replace(',', ' ')}; {cores} cores"


def versions() -> str:
    """Versions of what the figure depends on most."""
    return f"python {sys.version.split()[0]} torch {torch.__version__} numpy {numpy.__version__}"


def commit() -> str:
    """The commit that was measured; ``-dirty`` where sources or scripts differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
