"""Ways to gather random rows of 256 bytes out of host memory on a CPU, in small and in huge pages, over a memory copy.

    python dev/experiments/host_gather.py [--gigabytes 8] [--rows 1000000 65536]

Every way takes its turn in every round; a ratio is taken round by round, over the quicker one of two ways to copy as
many consecutive rows. Rows are distinct; `ascending` is how a bank asks for them, `shuffled` any other order.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from torch_engram.stores import pages
from torch_engram.stores.gather import gather_rows

NBYTES, ROUNDS = 256, 9
THREADS = len(os.sched_getaffinity(0))
POOL = ThreadPoolExecutor(THREADS)
Way = Callable[[Tensor, Tensor, Tensor], object]


def shared_table(size: int, huge: bool) -> Tensor:
    """Rows ``[n, NBYTES]`` in shared memory, whose first and last words are their numbers."""
    descriptor = os.memfd_create("host-gather")
    os.ftruncate(descriptor, size)
    memory = pages.map_shared(descriptor, size, writable=True)
    if huge:
        print(f"all pages are huge: {pages.allocate_shared(descriptor, memory)}")
    os.close(descriptor)
    table = torch.from_numpy(memory).view(-1, NBYTES)
    words = table.view(torch.int64)
    for start in range(0, len(table), 1 << 18):
        part = words[start : start + (1 << 18)]
        part[:] = torch.arange(start, start + len(part))[:, None]
    return table


def in_threads(way: Way, slices: int = 1) -> Way:
    """A way by Python threads, each with as many slices of the rows."""

    def run(table: Tensor, index: Tensor, out: Tensor) -> None:
        bounds = [len(index) * part // (THREADS * slices) for part in range(THREADS * slices + 1)]
        list(POOL.map(lambda a, b: way(table, index[a:b], out[a:b]), bounds[:-1], bounds[1:]))

    return run


def consecutive(table: Tensor, index: Tensor) -> Tensor:
    """As many consecutive rows, somewhere in the table."""
    first = int(index[0]) % (len(table) - len(index))
    return table[first : first + len(index)]


def by_torch(dtype: torch.dtype) -> Way:
    """``index_select`` over words."""
    return lambda table, index, out: torch.index_select(table.view(dtype), 0, index, out=out.view(dtype))


def by_numpy(kind: str) -> Way:
    """``take`` over items or words."""
    return lambda table, index, out: np.take(
        table.numpy().view(kind), index.numpy(), axis=0, out=out.numpy().view(kind), mode="clip"
    )


def in_blocks(table: Tensor, index: Tensor, out: Tensor) -> None:
    """``index_select`` of so few rows at a time that torch does not divide them among its own threads."""
    for wanted, target in zip(index.split(2048), out.split(2048), strict=True):
        by_torch(torch.complex128)(table, wanted, target)


def touched_first(table: Tensor, index: Tensor, out: Tensor) -> None:
    """A block's first words are read before its rows are copied, so that all of its misses are under way at once."""
    words = table.view(torch.int64).view(-1).numpy()
    for start in range(0, len(index), 512):
        part = index[start : start + 512]
        np.take(words, part.numpy() * (NBYTES // 8), mode="clip")
        by_numpy(f"V{NBYTES}")(table, part, out[start : start + 512])


ITEMS = by_numpy(f"V{NBYTES}")
WAYS: dict[str, Way] = {
    "copy: torch": lambda table, index, out: out.copy_(consecutive(table, index)),
    "copy: threads": in_threads(lambda table, index, out: np.copyto(out.numpy(), consecutive(table, index).numpy())),
    "index_select, 8-byte words": by_torch(torch.int64),
    "index_select, 16-byte words": by_torch(torch.complex128),
    "index_select, blocks, one thread": lambda table, index, out: in_blocks(table, index, out),
    "index_select, blocks, threads": lambda table, index, out: in_threads(in_blocks, 4)(table, index, out),
    "take, 8-byte words, threads": in_threads(by_numpy("i8")),
    "take, items": ITEMS,
    "take, items, threads": in_threads(ITEMS),
    "take, items, touched first": in_threads(touched_first),
    "sorted first, then put back": lambda table, index, out: _sorted_first(table, index, out),
    "gather_rows": gather_rows,
    "gather_rows into fresh memory": lambda table, index, out: gather_rows(table, index, torch.empty_like(out)),
}


def _sorted_first(table: Tensor, index: Tensor, out: Tensor) -> None:
    ascending, order = index.sort()
    out[order] = gather_rows(table, ascending, torch.empty_like(out))


def seconds(way: Way, *arguments: Tensor) -> float:
    start = time.perf_counter()
    way(*arguments)
    return time.perf_counter() - start


def compare(table: Tensor, rows: int, ascending: bool, what: str) -> None:
    out = torch.from_numpy(pages.private_memory(rows * NBYTES)).view(rows, NBYTES)
    out.fill_(0)
    took: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        index = torch.randint(len(table), (rows + rows // 8,)).unique()
        index = index[torch.randperm(len(index))[:rows]]
        if ascending:
            index = index.sort().values
        for name, way in WAYS.items():
            took[name].append(seconds(way, table, index, out))
            if not name.startswith("copy") and "fresh" not in name:
                assert torch.equal(out.view(torch.int64)[:, 0], index)
    copies = [min(pair) for pair in zip(took["copy: torch"], took["copy: threads"], strict=True)]
    for name, samples in took.items():
        ratio = statistics.median(copy / own for copy, own in zip(copies, samples, strict=True))
        speed = rows * NBYTES / statistics.median(samples) / 1e9
        order = "ascending" if ascending else "shuffled"
        print(f"{what:6} {rows:9,} {order:9} {name:32} {speed:6.2f} GB/s  {ratio:.2f} of a copy", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000, 65_536])
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    print(f"{THREADS} threads, torch {torch.__version__}, numpy {np.__version__}, {options.gigabytes} GB")
    for huge in (False, True):
        table = shared_table(int(options.gigabytes * 1e9) // NBYTES * NBYTES, huge)
        for rows in options.rows:
            for ascending in (True, False):
                compare(table, rows, ascending, "huge" if huge else "small")
        del table


if __name__ == "__main__":
    main()
