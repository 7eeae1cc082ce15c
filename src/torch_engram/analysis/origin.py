"""Where a figure comes from: the machine, the versions and the code that gave it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy
import torch

from torch_engram import __version__

ORIGIN = ("device", "versions", "date")
"""Columns of :func:`origin`."""


def origin(device: str) -> list[str]:
    """One text a column of :data:`ORIGIN`."""
    return [device_name(device), versions(), datetime.date.today().isoformat()]


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


def revision() -> str:
    """The library's version and, in a clone, its commit; ``-dirty`` where its sources differ from that."""
    sources = Path(__file__).parents[1]
    asked = ("ls-files", "--error-unmatch", __file__), ("rev-parse", "--short", "HEAD"), ("status", "--porcelain", ".")
    try:  # the first fails where the package lies in a clone of something else
        _, commit, changed = (
            subprocess.run(["git", "-C", str(sources), *what], capture_output=True, text=True, check=True).stdout
            for what in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__} {commit.strip()}" + ("-dirty" if changed else "")
