"""Rows of a GPU into a table in host memory: written by the GPU itself, or copied to the host and written by the CPU.

The CPU would go to some millions of random places of its memory, with one thread, and take part in every step. The GPU
sends them and waits for none, so a few programs keep the bus full, and its other processors stay with the network.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torch_engram.kernels import use_kernels
from torch_engram.stores.host_reads import HostReads
from torch_engram.stores.ordered_writes import staged

_PROGRAMS = 32
"""Of the GPU, that write."""


class HostWrites:
    """What one GPU writes, each write whole before the next begins. ``reads``: the same GPU's, whose table it is."""

    def __init__(self, reads: HostReads):
        self._reads, self._device = reads, reads.device
        self._stream = torch.cuda.Stream(reads.device) if reads.device.type == "cuda" else None

    def begin(self, keys: Tensor, records: Tensor) -> Callable[[], None]:
        """What writes the ``records`` uint8 ``[U, nbytes]`` of distinct keys ``[U]`` that the current stream was given
        so far. It may be called on any thread, and returns when the CPU and every stream find them in the table."""
        words, marks = self._reads.words, self._reads.marks
        if words is not None and marks is not None and use_kernels(keys):
            return partial(self._write, words, marks, keys, records, self._now())
        return staged(self._reads.table.scatter, keys, records)

    def _now(self) -> torch.cuda.Event | None:
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    def _write(
        self, words: Tensor, marks: Tensor, keys: Tensor, records: Tensor, ready: torch.cuda.Event | None
    ) -> None:
        from torch_engram.stores.table_kernels import scatter_triton

        with torch.cuda.stream(self._stream):
            if ready is not None:
                ready.wait()
            scatter_triton(words, self._reads.bases, keys, records.view(torch.int64), marks, _PROGRAMS)
            if self._stream is not None:
                done = torch.cuda.Event(blocking=True)  # this thread sleeps meanwhile
                done.record()
                done.synchronize()  # until then keys and records are held here, so that nothing takes their place
