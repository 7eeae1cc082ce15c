"""Rows of a table in host memory, gathered side by side by as many threads as there are cores.

Every thread calls torch for blocks that torch does not divide among its own threads: those wait spinning for each
other, which takes many times as long where something else is at work on the machine. NumPy's ``take`` would hold the
GIL all the while. dev/experiments/host_gather.py compares the ways.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

THREADS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_ALONE = 256 << 10
"""Bytes that one thread has copied before another one is awake."""
_SLICES = 4
"""Slices a thread: the cores are rarely equally fast."""
_UNDIVIDED = 32768
"""Words of a block that torch leaves to the thread that calls it."""
_PROCESS = os.getpid()
"""After a fork there are no threads, and torch can begin none: the one that asks does it all."""


def gather_rows(table: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Fill ``out`` ``[U, nbytes]`` with the rows ``index`` int64 ``[U]`` of ``table`` ``[rows, nbytes]``; returns it.

    Tables and results are contiguous uint8 on the CPU, and ``nbytes`` is a multiple of 8. Raises ``IndexError`` for a
    row that is not there.
    """
    word = torch.complex128 if table.shape[1] % 16 == 0 else torch.int64  # the widest that divides a row
    rows, found = table.view(word), out.view(word)
    block = max(1, _UNDIVIDED // rows.shape[1])
    size = max(-(-len(index) // (THREADS * _SLICES)), -(-_ALONE // table.shape[1]))
    if THREADS == 1 or size >= len(index) or os.getpid() != _PROCESS:
        _take(rows, index, found, block)
        return out
    parts = list(zip(index.split(size), found.split(size), strict=True))
    others = [_pool().submit(_take, rows, *part, block) for part in parts[1:]]
    try:
        _take(rows, *parts[0], block)
    finally:
        for future in others:
            future.result()
    return out


def _take(rows: Tensor, index: Tensor, found: Tensor, block: int) -> None:
    for wanted, target in zip(index.split(block), found.split(block), strict=True):
        torch.index_select(rows, 0, wanted, out=target)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, THREADS - 1), thread_name_prefix="engram-gather")
