"""Rows of a table in host memory to a GPU, by two ways: staged, and read by the GPU itself.

Staged, the CPU gathers a piece of the rows into pinned memory and the copy engine moves it while the next piece is
gathered. The GPU's own reads need no CPU, but a bus request for every few words, and are quicker for few rows. From how
many rows on staging is quicker is measured when the first rows are asked for.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_engram.kernels import use_kernels
from torch_engram.stores.gather import gather_rows
from torch_engram.stores.pages import Bytes
from torch_engram.stores.records import make_keys
from torch_engram.stores.table import RecordTable

STAGING = 24 << 20
"""Bytes that are pinned for staging, at most."""
_BUFFERS = 3
_SIZES = (1 << 8, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18)
"""Rows of the fetches that are measured."""
_ROUNDS = 3
_MOST_SECONDS = 0.3
"""What may be measured after that is not."""


class Staging:
    """Pinned buffers between rows in host memory and a GPU: ``STAGING`` bytes over all of them. Any thread may use it.

    Where nothing can be pinned, ordinary memory takes its place, with a warning; copies are slower then.
    """

    def __init__(self, device: torch.device, nbytes: int):
        self._device, self._lock = device, threading.Lock()
        rows = max(1, STAGING // _BUFFERS // nbytes)
        self._buffers = [_pinned((rows, nbytes), device) for _ in range(_BUFFERS)]
        self._free: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self._turns = cycle(range(_BUFFERS))

    def fetch(self, table: Tensor, index: Tensor) -> Tensor:
        """Rows ``index`` int64 ``[U]`` of ``table`` uint8 ``[rows, nbytes]``, both on the CPU: ``[U, nbytes]`` on the
        GPU, in the order of its current stream."""
        out = torch.empty((len(index), table.shape[1]), dtype=torch.uint8, device=self._device)
        with self._lock:
            for piece, target in zip(*(whole.split(len(self._buffers[0])) for whole in (index, out)), strict=True):
                if len(piece):
                    self._move(table, piece, target)
        return out

    def _move(self, table: Tensor, index: Tensor, target: Tensor) -> None:
        turn = next(self._turns)
        free = self._free[turn]
        if free is not None:
            free.synchronize()
        gathered = gather_rows(table, index, self._buffers[turn][: len(index)])
        target.copy_(gathered, non_blocking=True)
        if self._device.type == "cuda":
            self._free[turn] = torch.cuda.current_stream(self._device).record_event()


class DirectReads:
    """A table in host memory that a GPU reads itself; ``memory`` is the table's, mapped so that it may be written.

    Raises ``RuntimeError`` when it cannot be pinned.
    """

    def __init__(self, table: RecordTable, memory: Bytes, device: torch.device):
        _register(self, memory, device)
        size = table.records.numel()
        self._words = torch.from_numpy(memory[:size]).view(torch.int64).view(len(table.records), -1)
        self._bases = table.bases.to(device)

    def fetch(self, keys: Tensor) -> Tensor:
        """Records uint8 ``[U, nbytes]`` of keys ``[U]``, both on the GPU. The rows must be there."""
        from torch_engram.stores.table_kernels import gather_triton

        return gather_triton(self._words, self._bases, keys).view(torch.uint8)


class HostReads:
    """Both ways for one GPU, or staging alone where ``writable`` is not given, which maps the table's memory once more
    so that it can be pinned."""

    def __init__(self, table: RecordTable, device: torch.device, writable: Callable[[], Bytes] | None = None):
        self._table, self._staging = table, Staging(device, table.layout.nbytes)
        self._direct = None if writable is None else _direct(table, device, writable)
        self.staged_from = 0
        """The least number of rows that are staged; fewer are read by the GPU itself."""
        if self._direct is not None:
            self.staged_from = _measure(table, device, self._direct.fetch, self._stage)

    def fetch(self, keys: Tensor) -> Tensor:
        """Records uint8 ``[U, nbytes]`` of keys ``[U]`` on the GPU."""
        if self._direct is not None and len(keys) < self.staged_from and use_kernels(keys):
            return self._direct.fetch(keys)
        return self._stage(keys)

    def _stage(self, keys: Tensor) -> Tensor:
        return self._staging.fetch(self._table.records, self._table.checked_index(keys.cpu()))


def break_even(sizes: Sequence[int], direct: Sequence[float], staged: Sequence[float]) -> int:
    """The least of ascending ``sizes`` from which on staging takes less time at every one; past all where at none."""
    found = sys.maxsize
    for size, by_gpu, by_cpu in reversed(list(zip(sizes, direct, staged, strict=True))):
        if by_cpu >= by_gpu:
            break
        found = size
    return found


def _measure(table: RecordTable, device: torch.device, *ways: Callable[[Tensor], Tensor]) -> int:
    """The break-even of the two ways, by fetches of random rows."""
    sizes: list[int] = []
    times: tuple[list[float], list[float]] = ([], [])
    space, rows = max(table.spaces.items(), key=lambda found: found[1])
    generator = torch.Generator().manual_seed(0)
    begun = time.perf_counter()
    for size in _SIZES:
        if time.perf_counter() - begun > _MOST_SECONDS:
            break
        sizes.append(size)
        for way, took in zip(ways, times, strict=True):
            wanted = [torch.randint(rows, (size,), generator=generator).sort().values for _ in range(_ROUNDS + 1)]
            took.append(min([_seconds(way, make_keys(space, ids).to(device)) for ids in wanted][1:]))
    return break_even(sizes, *times)


def _seconds(way: Callable[[Tensor], Tensor], keys: Tensor) -> float:
    torch.cuda.synchronize(keys.device)
    begun = time.perf_counter()
    way(keys)
    torch.cuda.synchronize(keys.device)
    return time.perf_counter() - begun


def _direct(table: RecordTable, device: torch.device, writable: Callable[[], Bytes]) -> DirectReads | None:
    try:
        return DirectReads(table, writable(), device)
    except (RuntimeError, MemoryError) as error:
        warnings.warn(f"The table cannot be pinned ({error}): the CPU gathers all rows for {device}.", stacklevel=2)
        return None


def _register(owner: object, memory: Bytes, device: torch.device) -> None:
    """Pin memory for as long as ``owner`` lives."""
    runtime: Any = torch.cuda.cudart()
    refused = int(runtime.cudaHostRegister(memory.ctypes.data, len(memory), 3))  # for all contexts, mapped
    if refused:
        with suppress(RuntimeError):  # the next launch is told of this error, too
            torch.empty(1, device=device).fill_(0)
        raise RuntimeError(f"CUDA error {refused} for {len(memory) / 1e9:,.1f} GB")
    weakref.finalize(owner, _unregister, runtime, memory).atexit = False


def _unregister(runtime: Any, memory: Bytes) -> None:
    runtime.cudaHostUnregister(memory.ctypes.data)


def _pinned(shape: tuple[int, int], device: torch.device) -> Tensor:
    if device.type == "cuda":
        try:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            warnings.warn(f"No memory can be pinned for copies to {device} ({error}).", stacklevel=2)
    return torch.from_numpy(np.empty(shape, np.uint8))
