"""The memory of tables on the host, as the CPU and GPUs reach it.

A GPU that reads rows at random places of pinned memory waits for its own page tables, which map such memory in small
pages: past a few GiB 28 M rows a second come, whatever their length. Unified memory that is told to stay on the host is
mapped in pages of 2 MiB, and 126 to 139 M come (dev/checks/host-pages-h100.log). But it belongs to one process, so what
several share is pinned.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from torch_engram.stores.pages import Bytes, private_memory, require_room
from torch_engram.stores.pinned import register

_ATTACH_GLOBAL = 1
_PREFERRED_LOCATION, _ACCESSED_BY = 3, 5
_CPU = -1
_CONCURRENT_ACCESS = 89
"""The driver's numbers."""


class HostMemory(Protocol):
    """Bytes of one table, or of several."""

    @property
    def bytes(self) -> Bytes:
        """As the CPU reaches them."""

    def reach(self, device: torch.device) -> Bytes:
        """The same bytes as kernels of a GPU reach them, from now on. Raises ``RuntimeError`` when the driver refuses,
        ``MemoryError`` when they cannot be mapped."""


def own_memory(size: int) -> HostMemory:
    """``size`` bytes of zeros of this process alone, for GPUs to read: unified where the driver has it, and otherwise,
    with a warning, to be pinned. Raises ``MemoryError`` when the system has no room for them."""
    require_room(size)
    try:
        return UnifiedMemory(size)
    except (RuntimeError, OSError) as refusal:
        warnings.warn(
            f"There is no unified memory that stays on the host ({refusal}): GPUs read this table through small pages, "
            "and rows at random places several times slower.",
            stacklevel=3,
        )
    return PrivateMemory(private_memory(size))


class PrivateMemory:
    """Ordinary memory of this process, pinned when a GPU is to reach it."""

    def __init__(self, memory: Bytes):
        self._memory, self._pinned = memory, False

    @property
    def bytes(self) -> Bytes:
        """See :class:`HostMemory`."""
        return self._memory

    def reach(self, device: torch.device) -> Bytes:
        """See :class:`HostMemory`."""
        if not self._pinned:
            register(self, self._memory)
            self._pinned = True
        return self._memory


class UnifiedMemory:
    """``size`` bytes of zeros that stay on the host; GPUs read them there and keep no copy.

    Pages come at first touch, by whichever processor. Raises ``RuntimeError`` when the driver has no such memory that
    the CPU may use while a GPU does (on Windows, and some virtual machines), ``OSError`` when there is no driver.
    """

    def __init__(self, size: int):
        self._driver: Any = ctypes.CDLL("libcuda.so.1")
        torch.cuda.mem_get_info()  # this thread has a context now
        allowed, device = ctypes.c_int(), torch.cuda.current_device()
        self._do("cuDeviceGetAttribute", ctypes.byref(allowed), ctypes.c_int(_CONCURRENT_ACCESS), ctypes.c_int(device))
        if not allowed.value:
            raise RuntimeError("the CPU may not use it while a GPU does")
        address = ctypes.c_uint64()
        self._size = max(size, 1)
        self._do("cuMemAllocManaged", ctypes.byref(address), ctypes.c_size_t(self._size), ctypes.c_uint(_ATTACH_GLOBAL))
        self._address = int(address.value)
        self._memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._address))
        free: Callable[[Any], int] = self._driver.cuMemFree_v2
        weakref.finalize(self._memory, free, address).atexit = False  # threads may read to the very end
        self._advise(_PREFERRED_LOCATION, _CPU)

    @property
    def bytes(self) -> Bytes:
        """See :class:`HostMemory`."""
        return self._memory

    def reach(self, device: torch.device) -> Bytes:
        """See :class:`HostMemory`."""
        with torch.cuda.device(device):
            torch.cuda.mem_get_info()
            self._advise(_ACCESSED_BY, torch.cuda.current_device())
        return self._memory

    def _advise(self, what: int, device: int) -> None:
        place = (ctypes.c_uint64(self._address), ctypes.c_size_t(self._size))
        self._do("cuMemAdvise", *place, ctypes.c_int(what), ctypes.c_int(device))

    def _do(self, name: str, *arguments: Any) -> None:
        refused = getattr(self._driver, name)(*arguments)
        if refused:
            raise RuntimeError(f"CUDA error {refused} from {name}")
