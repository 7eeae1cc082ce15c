"""The table in host memory, within reach of GPUs: rows cross the bus once per use, in both directions.

Writes return at once; one thread carries them out in order and acknowledges them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from torch_engram.stores.host_asks import HostAsk
from torch_engram.stores.host_memory import own_memory
from torch_engram.stores.host_reads import HostReads
from torch_engram.stores.ordered_writes import OrderedWrites
from torch_engram.stores.records import RecordLayout
from torch_engram.stores.table import RecordTable, TableStore


class HostStore(TableStore):
    """A writable store in host memory that serves keys from, and records to, any device.

    ``for_gpu``: whether GPUs read its rows where they are; by default, whether there is one. Raises ``MemoryError``
    when the system has no room for such a table.
    """

    def __init__(self, layout: RecordLayout, spaces: Mapping[int, int], for_gpu: bool | None = None):
        for_gpu = torch.cuda.is_available() if for_gpu is None else for_gpu
        memory = own_memory(sum(spaces.values()) * layout.nbytes) if for_gpu else None
        super().__init__(RecordTable(layout, spaces, torch.device("cpu"), memory))
        if for_gpu:
            self.table.words.zero_()  # all threads make its pages now; a GPU's first touch would make them one by one
        self._writes = OrderedWrites(self.table.scatter, "host memory")
        self._reads: dict[torch.device, HostReads] = {}
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
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self._writes.write(keys, records)

    def flush(self) -> None:
        """See :class:`~torch_engram.stores.protocol.WritableStore`. Raises what a failed write raised, and from then on
        ``RuntimeError``: the rows are no longer those that were written."""
        self._writes.flush()
