"""Asynchronous direct reads and writes of Linux, which keep as many under way as a disk takes, from one thread.

The system calls are made by number, for Python has none of them. Past the page cache these are as quick as those of
io_uring, and containers allow them where they forbid that one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import weakref

import numpy as np

from torch_engram.stores.row_reads import Bytes, Int64s

_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""io_setup, io_destroy, io_getevents, io_submit."""
_UNDER_WAY = 1024
_READ, _WRITE = 0, 1
_REQUEST = np.dtype([
    ("data", "u8"), ("key", "u4"), ("rw_flags", "u4"), ("opcode", "u2"), ("priority", "i2"), ("descriptor", "u4"),
    ("address", "u8"), ("size", "u8"), ("start", "i8"), ("reserved", "u8"), ("flags", "u4"), ("event_descriptor", "u4"),
])  # fmt: skip
"""The kernel's ``struct iocb``, little-endian."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_LIBC.syscall.argtypes = [ctypes.c_long] * 6
_EVENT = np.dtype([("data", "u8"), ("request", "u8"), ("result", "i8"), ("result2", "i8")])


class AioTransfer:
    """A :data:`~torch_engram.stores.block_reads.Transfer` from files, or with ``writes`` to them, for one thread at a
    time. Raises ``OSError`` where a system does not allow it."""

    def __init__(self, writes: bool = False) -> None:
        if platform.system() != "Linux" or platform.machine() not in _NUMBERS:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        setup, destroy, self._getevents, self._submit = _NUMBERS[platform.machine()]
        context = ctypes.c_ulong(0)
        refused = -_call(setup, _UNDER_WAY, ctypes.addressof(context))
        if refused:
            raise OSError(refused, os.strerror(refused))
        self._context = context.value
        weakref.finalize(self, _call, destroy, self._context)
        self._events = np.empty(_UNDER_WAY, _EVENT)
        self._noted = self._events.ctypes.data
        self._opcode = _WRITE if writes else _READ
        self._make_requests(_UNDER_WAY)

    def _make_requests(self, many: int) -> None:
        """Memory for ``many`` requests at once, which is kept: what is the same for all is written here."""
        self._requests = np.zeros(many, _REQUEST)
        self._requests["data"], self._requests["opcode"] = np.arange(many), self._opcode
        self._pointers = self._requests.ctypes.data + np.arange(many) * _REQUEST.itemsize
        self._first = self._pointers.ctypes.data

    def __call__(self, descriptors: Int64s, starts: Int64s, sizes: Int64s, buffer: Bytes, places: Int64s) -> Int64s:
        """See :data:`~torch_engram.stores.block_reads.Transfer`."""
        if len(starts) > len(self._requests):
            self._make_requests(len(starts))
        requests = self._requests[: len(starts)]
        requests["descriptor"], requests["address"] = descriptors, buffer.ctypes.data + places
        requests["size"], requests["start"] = sizes, starts
        done = np.zeros(len(starts), np.int64)
        begun = ended = 0
        try:
            while ended < len(starts):
                many = min(len(starts) - begun, _UNDER_WAY - (begun - ended))
                if many:
                    taken = _call(self._submit, self._context, many, self._first + begun * self._pointers.itemsize)
                    if taken < 0 and not (taken == -errno.EAGAIN and begun > ended):
                        done[begun], taken, ended = taken, 1, ended + 1  # the first of them is refused
                    begun += max(taken, 0)
                under_way = begun - ended
                ended += self._finish(done, under_way if begun == len(starts) else under_way // 2)
        finally:
            while ended < begun:  # the buffer is the caller's again only then
                ended += self._finish(done, 1)
        return done

    def _finish(self, done: Int64s, at_least: int) -> int:
        """Note the results of ``at_least`` requests, or of some when a signal comes; returns of how many."""
        many = _call(self._getevents, self._context, at_least, _UNDER_WAY, self._noted, 0)
        if many < 0 and many != -errno.EINTR:
            raise OSError(-many, os.strerror(-many))
        ended = self._events[: max(many, 0)]
        done[ended["data"].astype(np.int64)] = ended["result"]
        return len(ended)


def _call(number: int, *arguments: int) -> int:
    """A system call; its result, or the negative error number."""
    done = int(_LIBC.syscall(number, *arguments, *(0,) * (5 - len(arguments))))
    return done if done >= 0 else -ctypes.get_errno()
