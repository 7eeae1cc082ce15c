"""The machine that a memory is placed on: what it has free, and how fast it moves bytes.

What is free here is found out. Rates are not: they are the user's, those of a machine that was measured once, or what
:mod:`torch_engram.bench.rates` measures.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch_engram.free_memory import free_memory


@dataclass(frozen=True)
class Machine:
    """Bytes that are free, and rates. The defaults of the rates were measured on one H100 80 GB with 16 CPU cores, PCIe
    5 x16 and a local disk, with rows of 256 bytes at random places."""

    hbm: int
    """Bytes of GPU memory; 0 without a GPU."""
    ram: int
    disk: int | None
    """None for a disk with room for whatever is placed there."""
    bus: float = 54.9e9
    """Bytes a second of copies from pinned memory to the GPU."""
    host_gather: float = 33.5e9
    """Bytes a second of rows in host memory that reach the GPU: 100,000 rows of 272 bytes that it reads itself in
    unified memory (dev/checks/host-pages-h100.log). Without a GPU, those that the CPU gathers, 17 to 27e9 there."""
    device_gather: float = 1283e9
    """Bytes a second of rows gathered in GPU memory."""
    disk_iops: float = 47_000
    """Random reads of 4 KiB a second, 64 at a time."""
    disk_latency: float = 312e-6
    """Seconds of one such read alone."""

    def __post_init__(self) -> None:
        for name in ("bus", "host_gather", "device_gather", "disk_iops", "disk_latency"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name.replace('_', ' ')} is {getattr(self, name)}: give a number above 0.")


def free_hbm() -> int:
    """Bytes that are free on the first GPU; 0 without one."""
    import torch

    return int(torch.cuda.mem_get_info(0)[0]) if torch.cuda.is_available() else 0


def free_ram() -> int:
    """Bytes of memory that a process may take. Raises ``ValueError`` where the system does not say."""
    found = free_memory()
    if found is None:
        raise ValueError("This system does not say how much memory is free: give --ram.")
    return found


def free_disk(folder: Path) -> int:
    """Bytes that are free where ``folder`` lies. Raises ``OSError`` for one that is not there."""
    return shutil.disk_usage(folder).free
