"""Rows of a table in host memory, gathered side by side by as many threads as there are cores.

NumPy copies rows as items of their own size, a call to ``memcpy`` each, without the GIL; torch's ``index_select`` is
slower, and its threads wait spinning for each other, which takes ten times as long where something else is at work on
the machine (dev/experiments/host_gather.py).
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

THREADS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_ALONE = 256 << 10
"""Bytes that one thread has copied before another one is awake."""
_SLICES = 4
"""Slices a thread: the cores are rarely equally fast."""


def gather_rows(table: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Fill ``out`` ``[U, nbytes]`` with the rows ``index`` int64 ``[U]`` of ``table`` ``[rows, nbytes]``; returns it.

    All are contiguous, on the CPU; the rows must be there, for others are not told from them.
    """
    rows, wanted, found = _items(table), index.contiguous().numpy(), _items(out)
    size = max(-(-len(wanted) // (THREADS * _SLICES)), -(-_ALONE // table.shape[1]))
    if THREADS == 1 or size >= len(wanted):
        _take(rows, wanted, found)
        return out
    pool = _pool(os.getpid())
    parts = [slice(start, start + size) for start in range(size, len(wanted), size)]
    others: list[Future[None]] = [pool.submit(_take, rows, wanted[part], found[part]) for part in parts]
    _take(rows, wanted[:size], found[:size])
    for future in others:
        future.result()
    return out


def _items(records: Tensor) -> NDArray[np.void]:
    """Each row as one item ``[rows]``, without a copy."""
    assert records.is_contiguous() and records.dtype == torch.uint8
    return records.numpy().view(f"V{records.shape[1]}").reshape(len(records))


def _take(rows: NDArray[np.void], wanted: NDArray[np.int64], found: NDArray[np.void]) -> None:
    np.take(rows, wanted, out=found, mode="clip")  # in any other mode rows are copied twice


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of one process: after a fork there are none of the parent's."""
    return ThreadPoolExecutor(max(1, THREADS - 1), thread_name_prefix="engram-gather")
