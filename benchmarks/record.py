"""Where measurements go: one CSV a claim, one row a case and run, never edited by hand."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Sequence
from pathlib import Path

from torch_engram.analysis.origin import origin
from torch_engram.bench.results import MEASURED, Measurement

RESULTS = Path(__file__).parent / "results"
HEADER = ("claim", *MEASURED, "device", "versions", "commit", "date")


def record(
    claim: str,
    case: str,
    samples: Sequence[float],
    unit: str,
    *,
    reference: float | None = None,
    ratio: float | None = None,
    device: str = "cpu",
    seen: tuple[str, str, str, str] | None = None,
) -> None:
    """Append a row whose value is the median of ``samples``. ``reference``, ``ratio``: what it was measured against in
    the same run. ``seen``: device, versions, commit and date of samples out of a log; else they are of here and now."""
    measured = Measurement(case, samples, unit, reference, ratio)
    path = RESULTS / f"{claim}.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    if seen is None:
        name, versions, date = origin(device)
        seen = name, versions, commit(), date
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(HEADER)
        writer.writerow([claim, *measured.cells(), *seen])
    p20, p50, p80 = measured.quantiles
    print(f"{claim} {case}: {p50:.6g} {unit} (p20 {p20:.6g}, p80 {p80:.6g}, n {len(samples)})", flush=True)


def commit() -> str:
    """The commit that was measured; ``-dirty`` where sources or scripts differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
