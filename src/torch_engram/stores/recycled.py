"""Memory for results that is used again once nobody holds the result any more.

Large memory that is new has no pages yet, and the system hands them out more slowly than rows are gathered into them.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor

from torch_engram.stores.pages import Bytes, private_memory

_LEAST, _MOST, _KEPT = 1 << 20, 1 << 29, 2
"""Results of fewer bytes, or of more, have memory of their own; and how much unused memory is kept for later."""
_free: deque[Bytes] = deque(maxlen=_KEPT)  # its methods are atomic: a result may die in any thread, at any time


def recycled(rows: int, nbytes: int) -> Tensor:
    """Uninitialised bytes ``[rows, nbytes]`` on the CPU, the caller's own for as long as any tensor shares them."""
    size = rows * nbytes
    if not _LEAST <= size <= _MOST:
        return torch.empty((rows, nbytes), dtype=torch.uint8)
    memory = _taken(size)
    result = memory[:size]
    weakref.finalize(result, _free.append, memory).atexit = False  # the tensor holds this array, and nobody else
    return torch.from_numpy(result).view(rows, nbytes)


def _taken(size: int) -> Bytes:
    """Memory that is free, of ``size`` bytes at least and not of many times as much, or new."""
    for _ in range(len(_free)):
        try:
            memory = _free.popleft()
        except IndexError:  # another thread was first
            break
        if size <= len(memory) <= 4 * size:
            return memory
        if len(memory) > size:
            _free.append(memory)
    return private_memory(size + size // 4)
