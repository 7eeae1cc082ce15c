"""The table in host memory, within reach of GPUs: rows cross the bus once per use, in both directions.

Writes return at once; one thread carries them out in order and acknowledges them. Rows of a GPU that reaches the table
are written by the GPU itself (:mod:`torch_engram.stores.host_writes`), and the thread waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from torch_engram.stores.host_asks import HostAsk
from torch_engram.stores.host_memory import own_memory
from torch_engram.stores.host_reads import HostReads
from torch_engram.stores.host_writes import HostWrites
from torch_engram.stores.ordered_writes import OrderedWrites
from torch_engram.stores.records import RecordLayout
from torch_engram.stores.table import RecordTable, TableStore


class HostStore(TableStore):
    """A writable store in host memory that serves keys from, and records to, any device.

    ``for_gpu``: whether GPUs read and write its rows where they are; by default, whether there is one. Raises
    ``MemoryError`` when the system has no room for such a table.
    """

    def __init__(self, layout: RecordLayout, spaces: Mapping[int, int], for_gpu: bool | None = None):
        for_gpu = torch.cuda.is_available() if for_gpu is None else for_gpu
        rows = sum(spaces.values())
        memory, marks = (own_memory(rows * size) if for_gpu else None for size in (layout.nbytes, 1))
        super().__init__(RecordTable(layout, spaces, torch.device("cpu"), memory, marks))
        for own in (memory, marks):
            if own is not None:  # all threads make its pages now; a GPU's first touch would make them one by one
                torch.from_numpy(own.bytes).zero_()
        self._writes = OrderedWrites(self._begin_write, "host memory")
        self._reads: dict[torch.device, HostReads] = {}
        self._by_gpu: dict[torch.device, HostWrites] = {}
        self._lock = threading.Lock()

    @property
    def acknowledged(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self._writes.acknowledged

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.Store`. A row that a pending write is changing may come back
        torn; its write is not acknowledged, so the reader patches it."""
        if keys.device.type == "cpu":
            return self.table.gather(keys)
        return self._reads_of(keys.device).fetch(keys)

    def new_ask(self, capacity: int, device: torch.device) -> HostAsk:
        """See :class:`~torch_engram.stores.asks.AskedStore`. As with :meth:`fetch`, rows may come back torn."""
        return self._reads_of(device).new_ask(capacity)

    def _reads_of(self, device: torch.device) -> HostReads:
        with self._lock:
            if device not in self._reads:
                self._reads[device] = HostReads(self.table, device)
            return self._reads[device]

    def write(self, keys: Tensor, records: Tensor) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`. Nobody may change the records from here on."""
        return self._writes.write(keys, records)

    def _begin_write(self, keys: Tensor, records: Tensor) -> Callable[[], None]:
        if keys.device.type == "cpu":
            return partial(self.table.scatter, keys, records)
        if keys.device not in self._by_gpu:
            self._by_gpu[keys.device] = HostWrites(self._reads_of(keys.device))
        return self._by_gpu[keys.device].begin(keys, records)

    def flush(self) -> None:
        """See :class:`~torch_engram.stores.protocol.WritableStore`. Raises what a failed write raised, and from then on
        ``RuntimeError``: the rows are no longer those that were written."""
        self._writes.flush()
