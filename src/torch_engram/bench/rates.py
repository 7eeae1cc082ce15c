"""The rates of this machine that costs of placements follow from, by the benchmarks that lookups are held against."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from torch_engram.bench.limits import RandomReads, bus_copy, gather, host_gather
from torch_engram.bench.lookup_tables import row_bytes, synthesise_layers
from torch_engram.bench.results import Measurement
from torch_engram.bench.timing import median
from torch_engram.config import EngramConfig
from torch_engram.stores import FileRows

_TABLE_BYTES = 1_000_000_000
_READS, _ALONE = 4096, 64
"""Blocks that a sample reads, as many at a time as the disk takes, and those that are read one by one."""
_REPEATS = 5


def measured_rates(config: EngramConfig, codec: str, folder: Path) -> dict[str, float]:
    """Rates of :class:`~torch_engram.analysis.Machine` by the name of its field, for rows of ``config`` in ``codec``.

    Those of the disk are of ``folder``, where a table of 1 GB is made, or of a quarter of what is free; they are left
    out where nothing can be read past the page cache, and the GPU's where there is none. Raises ``OSError`` for a
    folder that takes no files.
    """
    width = config.per_order("row_dim")[0]
    rows = max(1, min(_TABLE_BYTES, shutil.disk_usage(folder).free // 4) // row_bytes(codec, width))
    (table,) = synthesise_layers(folder, replace(config, layers=config.layers[:1]), rows, codec).values()
    files = FileRows.of(table)
    if not torch.cuda.is_available():
        return {"host_gather": _bytes_a_second(gather(files.layout, torch.device("cpu")))} | _of_disk(files)
    device = torch.device("cuda")
    rates = {
        "host_gather": _bytes_a_second(host_gather(files.layout, device)),
        "bus": _bytes_a_second(bus_copy(device)),
        "device_gather": _bytes_a_second(gather(files.layout, device)),
    }
    return rates | _of_disk(files)


def _of_disk(table: FileRows) -> dict[str, float]:
    try:
        disk = RandomReads([table])
    except (OSError, AttributeError):  # a file system, or a system, without direct reads
        return {}
    many = median([disk.blocks(_READS) for _ in range(_REPEATS)])
    one = median([disk.blocks(1) for _ in range(_ALONE)])
    return {"disk_iops": 1e3 * _READS / many, "disk_latency": 1e-3 * one}


def _bytes_a_second(measured: Measurement) -> float:
    """Of a measurement in GB/s."""
    return 1e9 * median(list(measured.samples))
