"""cpu-fetch-vs-copy: rows per second out of a shared table in host memory, over the rate of copying memory.

A table of random rows is written to disk and opened, as any table in files is. In every round a batch of random
distinct rows is fetched, and as many consecutive rows of the same table are copied, in two ways, to memory that has
been used before. The way of copying that is quicker over all rounds is what fetching is measured against, round by
round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from record import record
from torch import Tensor

from torch_engram.bench.results import quantiles
from torch_engram.stores import FileRows, SharedHostStore
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.recycled import recycled
from torch_engram.stores.synthetic import synthesise
from torch_engram.stores.tensor_files import tensors_in

THREADS = len(os.sched_getaffinity(0))
CLAIM = "cpu-fetch-vs-copy"
NBYTES, WIDTH = 256, 128
ROUNDS, BATCHES = 31, (1_048_576, 65_536)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def copy_by_threads(source: Tensor, target: Tensor, pool: ThreadPoolExecutor) -> None:
    """Copy with a thread for every core."""
    bounds = [len(source) * part // THREADS for part in range(THREADS + 1)]
    list(pool.map(lambda a, b: np.copyto(target[a:b].numpy(), source[a:b].numpy()), bounds[:-1], bounds[1:]))


def distinct_rows(rows: int, wanted: int) -> Tensor:
    """Random distinct rows, shuffled."""
    found = torch.randint(rows, (wanted + wanted // 8,)).unique()
    return found[torch.randperm(len(found))[:wanted]]


def measure(store: SharedHostStore, wanted: int, order: str) -> None:
    """Record ``wanted`` rows a fetch: ascending, as a bank asks for them, or shuffled."""
    table = store.table.records
    target = recycled(wanted, NBYTES).zero_()
    took: dict[str, list[float]] = {"torch": [], "threads": [], "fetch": []}
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(ROUNDS + 2):
            keys = distinct_rows(len(table), wanted)
            keys = keys.sort().values if order == "ascending" else keys
            first = int(torch.randint(len(table) - wanted, ()))
            source = table[first : first + wanted]
            took["torch"].append(seconds(partial(target.copy_, source)))
            took["threads"].append(seconds(partial(copy_by_threads, source, target, pool)))
            took["fetch"].append(seconds(partial(store.fetch, keys)))
    took = {way: samples[2:] for way, samples in took.items()}  # two to warm up
    copied = min(took["torch"], took["threads"], key=lambda samples: quantiles(samples)[1])
    case, size = f"{wanted}-{order}", wanted * NBYTES / 1e9
    ratios = [copy / fetch for copy, fetch in zip(copied, took["fetch"], strict=True)]
    record(CLAIM, case, ratios, "times", reference=1.0, ratio=quantiles(ratios)[1])
    rate = size / quantiles(copied)[1]
    speeds = [size / sample for sample in took["fetch"]]
    record(CLAIM, f"{case}-speed", speeds, "GB/s", reference=rate, ratio=quantiles(speeds)[1] / rate)
    record(CLAIM, f"{case}-copy", [size / sample for sample in copied], "GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the table")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where its files are made")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    rows = -(-int(options.gigabytes * 1e9) // NBYTES)
    beside = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        synthesise(beside / "table", "plain", rows, WIDTH, "bf16")
        (named,) = find_tables(tensors_in(beside / "table"))
        table = FileRows.of(named)
        store = SharedHostStore({0: table}, table.layout)
    finally:
        shutil.rmtree(beside)
    assert store.layout.nbytes == NBYTES
    wanted = distinct_rows(rows, 100)
    assert all(torch.equal(store.fetch(row[None]), table.read(int(row), int(row) + 1)) for row in wanted)
    for batch in BATCHES:
        for order in ("ascending", "shuffled"):
            measure(store, batch, order)


if __name__ == "__main__":
    main()
