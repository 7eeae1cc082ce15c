"""Rows in host memory to a GPU by way of pinned buffers: the CPU gathers a piece while the last one is copied."""

from __future__ import annotations

import threading
from itertools import cycle

import torch
from torch import Tensor

from torch_engram.stores.gather import gather_rows
from torch_engram.stores.pinned import pinned

STAGING = 72 << 20
"""Bytes that are pinned for staging, at most. A piece is large, because waking the threads that gather takes as long as
gathering a megabyte, and what follows a fetch is usually the next one."""
_BUFFERS = 3


class Staging:
    """Pinned buffers between rows of ``nbytes`` in host memory and a GPU: :data:`STAGING` bytes over all of them.

    Any thread may use it. Where nothing can be pinned, ordinary memory takes its place; copies are slower then.
    """

    def __init__(self, device: torch.device, nbytes: int):
        self._device, self._lock = device, threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        rows = max(1, STAGING // _BUFFERS // nbytes)
        self._buffers = [pinned((rows, nbytes), torch.uint8, device) for _ in range(_BUFFERS)]
        self._free: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self._turns = cycle(range(_BUFFERS))

    def move(self, table: Tensor, index: Tensor, out: Tensor, after: torch.cuda.Event | None = None) -> None:
        """Fill ``out`` uint8 ``[U, nbytes]`` on the GPU with rows ``index`` int64 ``[U]`` of ``table`` ``[rows,
        nbytes]``, both on the CPU. ``after``: when ``out`` may be written; by default, what the current stream was
        given so far. The current stream waits for the copies, this thread for the gathering.

        Raises ``IndexError`` for a row that is not there.
        """
        if self._stream is None:
            self._pieces(table, index, out)
            return
        current = torch.cuda.current_stream(self._device)
        if after is None:
            self._stream.wait_stream(current)
        else:
            self._stream.wait_event(after)
        with self._lock, torch.cuda.stream(self._stream):
            self._pieces(table, index, out)
            current.wait_event(self._stream.record_event())

    def _pieces(self, table: Tensor, index: Tensor, out: Tensor) -> None:
        most = len(self._buffers[0])
        for first in range(0, len(index), most):
            turn = next(self._turns)
            free = self._free[turn]
            if free is not None:
                free.synchronize()
            piece = index[first : first + most]
            gathered = gather_rows(table, piece, self._buffers[turn][: len(piece)])
            out[first : first + most].copy_(gathered, non_blocking=True)
            if self._stream is not None:
                self._free[turn] = self._stream.record_event()
