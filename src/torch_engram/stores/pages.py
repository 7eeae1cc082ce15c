"""Memory for tables, made of huge pages where the system grants them and spread over the nodes of the machine.

A row that is asked for at random costs a walk through the page tables besides its bytes. Pages of 2 MiB make that walk
short: dev/experiments/host_gather.py measures by how much. Private memory is advised to have them. Shared memory gets
them by being collapsed, which the system does on request even where it would not of its own accord (Linux 6.1).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torch_engram.free_memory import free_memory

Bytes = NDArray[np.uint8]
HUGE = 2 << 20
_MAP_FIXED, _INTERLEAVE = 0x10, 3
_MADV_HUGEPAGE, _MADV_POPULATE_READ, _MADV_COLLAPSE = 14, 22, 25
_MBIND = {"x86_64": 237, "aarch64": 235}
_PIECE = 64 << 20
_NODES = Path("/sys/devices/system/node/has_memory")
_READ, _WRITE = mmap.PROT_READ, mmap.PROT_WRITE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.syscall.restype = ctypes.c_long


def require_room(size: int) -> None:
    """Raises ``MemoryError`` when the system, or the group of processes that this one is in, has fewer bytes to give:
    it would go on to the end and then end processes."""
    room = free_memory()
    if room is not None and size > room:
        raise MemoryError(f"{size / 1e9:,.1f} GB are wanted and {room / 1e9:,.1f} are free.")


def private_memory(size: int) -> Bytes:
    """``size`` bytes of zeros of this process alone. Raises ``MemoryError`` when the system has no room for them."""
    memory = _map(size, lambda at, span: _mmap(at, span, _READ | _WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1))
    _spread(memory)
    _LIBC.madvise(memory.ctypes.data, len(memory), _MADV_HUGEPAGE)  # a wish: without it, pages are small
    return memory


def map_shared(descriptor: int, size: int, writable: bool) -> Bytes:
    """The first ``size`` bytes of a memory file. To write into a map that is not writable ends the process."""
    allowed = _READ | _WRITE if writable else _READ
    return _map(size, lambda at, span: _mmap(at, span, allowed, mmap.MAP_SHARED, descriptor))


def populate(memory: Bytes) -> None:
    """Have all pages of a map looked up now, which otherwise every row would wait for that is the first of its page."""
    _LIBC.madvise(memory.ctypes.data, len(memory), _MADV_POPULATE_READ)  # a wish: older systems do it row by row


def allocate_shared(descriptor: int, memory: Bytes) -> bool:
    """Give a memory file, mapped as ``memory`` and as long, all of its pages; returns whether all whole ones are huge.

    Raises ``OSError`` when the system has no room for them: later, that would end the process instead.
    """
    _spread(memory)
    huge = True
    for start in range(0, len(memory), _PIECE):
        span = min(_PIECE, len(memory) - start)
        whole = span - span % HUGE
        for at in range(start, start + whole, HUGE):  # where nothing is, nothing is collapsed
            os.pwrite(descriptor, b"\0", at)
        if whole:
            huge = not _LIBC.madvise(memory.ctypes.data + start, whole, _MADV_COLLAPSE) and huge
        os.posix_fallocate(descriptor, start, span)
    return huge


def _map(size: int, place: Callable[[int, int], int]) -> Bytes:
    """``size`` bytes from a huge page's first address on, as ``place`` maps them; unmapped when the array is gone."""
    span = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    reserved = _mmap(None, span + HUGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    at = -(-reserved // HUGE) * HUGE
    try:
        place(at, span)
    except MemoryError:
        _LIBC.munmap(reserved, span + HUGE)
        raise
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(at))
    weakref.finalize(memory, _LIBC.munmap, reserved, span + HUGE).atexit = False  # threads may read to the very end
    return memory


def _mmap(at: int | None, span: int, allowed: int, flags: int, descriptor: int) -> int:
    found = _LIBC.mmap(at, span, allowed, flags | (_MAP_FIXED if at else 0), descriptor, 0)
    if found == ctypes.c_void_p(-1).value:
        raise MemoryError(f"{span:,} bytes cannot be mapped: {os.strerror(ctypes.get_errno())}.")
    return int(found)


def _spread(memory: Bytes) -> None:
    """Let pages that are not there yet come from all nodes in turn, so that no node's memory is the narrow place."""
    nodes = _memory_nodes()
    number = _MBIND.get(platform.machine())
    if len(nodes) < 2 or number is None or platform.system() != "Linux":
        return
    mask = np.zeros(max(nodes) // 64 + 1, np.uint64)
    for node in nodes:
        mask[node // 64] |= np.uint64(1 << node % 64)
    arguments = (memory.ctypes.data, len(memory), _INTERLEAVE, mask.ctypes.data, 64 * len(mask) + 1, 0)
    _LIBC.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))  # a wish: containers may forbid it


def _memory_nodes() -> list[int]:
    """The machine's nodes that have memory, from a list such as ``0-3,8``."""
    try:
        ranges = [part.split("-") for part in _NODES.read_text().strip().split(",") if part]
    except OSError:
        return []
    return [node for part in ranges for node in range(int(part[0]), int(part[-1]) + 1)]
