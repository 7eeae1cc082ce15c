"""How a measurement is written down: quantiles of its samples, what it was measured against, where and with what."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_engram.analysis.origin import ORIGIN, origin
from torch_engram.durable import replacing

MEASURED = ("case", "value", "unit", "reference", "ratio", "p20", "p50", "p80", "n")
"""Columns of :meth:`Measurement.cells`."""


@dataclass(frozen=True)
class Measurement:
    """Samples of one thing; its value is their median."""

    case: str
    samples: Sequence[float]
    unit: str
    reference: float | None = None
    """What it was measured against in the same run."""
    ratio: float | None = None

    @property
    def quantiles(self) -> tuple[float, float, float]:
        """p20, p50 and p80 of the samples."""
        return quantiles(self.samples)

    def cells(self) -> list[str]:
        """One text a column of :data:`MEASURED`."""
        p20, p50, p80 = self.quantiles
        values = [self.case, p50, self.unit, self.reference, self.ratio, p20, p50, p80, len(self.samples)]
        return [f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value) for value in values]


def write_csv(path: Path, lead: Sequence[str], rows: Iterable[tuple[Sequence[str], Measurement]], device: str) -> None:
    """Replace ``path`` by a table: the columns ``lead``, then :data:`MEASURED` and :data:`ORIGIN`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*lead, *MEASURED, *ORIGIN])
    where = origin(device)
    writer.writerows([*names, *measured.cells(), *where] for names, measured in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def require_writable(folder: Path) -> None:
    """Raises ``ValueError`` for a folder that cannot be made, or that takes no files."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{folder} cannot be written, as {there} takes no files: choose another folder with --out.")


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, interpolated; of one sample, that sample."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]
