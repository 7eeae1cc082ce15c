"""Rows of a table in host memory to a GPU, by two ways at once: staged, and read by the GPU itself.

Staged, the CPU gathers rows into pinned memory and the copy engine moves them. The GPU's own reads need no CPU, but the
bus takes as long for a row at a random place, however short, as for many times its bytes: they are quicker for few
rows, and of many they take a share. From how many rows on the CPU helps, and how much it leaves to the GPU, is measured
when the first rows are asked for.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_engram.stores.host_asks import SHARES, HostAsk
from torch_engram.stores.pages import Bytes
from torch_engram.stores.pinned import register
from torch_engram.stores.records import make_keys
from torch_engram.stores.staging import Staging
from torch_engram.stores.table import RecordTable

_SIZES = (1 << 8, 1 << 10, 1 << 12, 1 << 14, 1 << 16)
"""Rows of the fetches that are measured."""
_SHARED = (1 << 13, 1 << 16)
"""Rows of those that are divided: about what decoding and prefill miss."""
_TRIED = tuple(SHARES * eighths // 8 for eighths in range(4))
_ROUNDS = 5
_MOST_SECONDS = 0.5
"""What may be measured after that is not."""


class HostReads:
    """Both ways for one GPU. ``writable`` maps the table's memory once more so that it can be pinned; not wanted where
    it is pinned already. Where it cannot be pinned, all rows are staged, with a warning."""

    def __init__(self, table: RecordTable, device: torch.device, writable: Callable[[], Bytes] | None = None):
        self.table, self.device = table, device
        self.staging = Staging(device, table.layout.nbytes)
        self.bases = table.bases.to(device)
        self.rows = torch.tensor([table.spaces.get(space, 0) for space in range(max(table.spaces) + 1)], device=device)
        """Of every space, 0 for one that is not there."""
        self.beside = torch.cuda.Stream(device) if device.type == "cuda" else None
        """For the GPU's own reads."""
        self.words = _reachable(self, table, writable)
        """The table int64 ``[rows, nbytes / 8]`` as the GPU reaches it; None where it does not."""
        self.staged_from, self.share = 0, 0
        """The least number of rows that are staged, fewer are read by the GPU itself; and of more its share, of 256."""
        if self.words is not None:
            self._seconds(_SIZES[0])  # compiles the kernels
            self.staged_from = self._break_even()
            self.share = self._best_share()

    def by_gpu(self, count: int) -> int:
        """How many of ``count`` rows, the first ones, the GPU reads itself."""
        if self.words is None:
            return 0
        return count if count < self.staged_from else count * self.share // SHARES

    def fetch(self, keys: Tensor) -> Tensor:
        """Records uint8 ``[U, nbytes]`` of keys ``[U]`` on the GPU. Raises ``ValueError`` naming a row or a space that
        is not there."""
        ask = HostAsk(self, len(keys))
        ask.send(keys.contiguous(), torch.full((1,), len(keys), device=self.device))
        ask.sent()
        ask.read_beside()
        return ask.bring()

    def _break_even(self) -> int:
        sizes: list[int] = []
        direct: list[float] = []
        staged: list[float] = []
        begun = time.perf_counter()
        for size in _SIZES:
            if time.perf_counter() - begun > _MOST_SECONDS:
                break
            sizes.append(size)
            for self.staged_from, took in ((sys.maxsize, direct), (0, staged)):
                took.append(self._seconds(size))
        return break_even(sizes, direct, staged)

    def _best_share(self) -> int:
        """The one that takes the least time over :data:`_SHARED`, each size counted alike."""
        sizes = [size for size in _SHARED if size >= self.staged_from]
        totals = {}
        begun = time.perf_counter()
        for self.share in _TRIED:
            if time.perf_counter() - begun > _MOST_SECONDS:
                break
            totals[self.share] = sum(self._seconds(size) / size for size in sizes)
        return min(totals, key=lambda share: totals[share], default=0)

    def _seconds(self, size: int) -> float:
        """The least that a fetch of so many random rows takes as things are set."""
        space, rows = max(self.table.spaces.items(), key=lambda found: found[1])
        return min(_timed(self, make_keys(space, torch.randint(rows, (size,)))) for _ in range(_ROUNDS))


def break_even(sizes: Sequence[int], direct: Sequence[float], staged: Sequence[float]) -> int:
    """The least of ascending ``sizes`` from which on staging takes less time at every one; past all where at none."""
    found = sys.maxsize
    for size, by_gpu, by_cpu in reversed(list(zip(sizes, direct, staged, strict=True))):
        if by_cpu >= by_gpu:
            break
        found = size
    return found


def _timed(reads: HostReads, keys: Tensor) -> float:
    keys = keys.to(reads.device)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    reads.fetch(keys)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _reachable(owner: object, table: RecordTable, writable: Callable[[], Bytes] | None) -> Tensor | None:
    """The table's words as kernels reach them."""
    if table.pinned:
        return table.words
    if writable is None:
        return None
    try:
        memory = writable()
        register(owner, memory)
    except (RuntimeError, MemoryError) as error:
        warnings.warn(f"The table cannot be pinned ({error}): the CPU gathers all its rows.", stacklevel=4)
        return None
    return torch.from_numpy(memory[: table.records.numel()]).view(torch.int64).view(table.words.shape)
