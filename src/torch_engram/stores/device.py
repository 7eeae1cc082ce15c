"""The table in the memory of the device that computes: HBM on a GPU, RAM on a CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_engram.stores.records import RecordLayout
from torch_engram.stores.table import RecordTable, TableStore


class DeviceStore(TableStore):
    """A writable store on ``device``. Writes are done in stream order and acknowledged at once."""

    def __init__(self, layout: RecordLayout, spaces: Mapping[int, int], device: torch.device | str):
        super().__init__(RecordTable(layout, spaces, torch.device(device)))
        self._epoch = 0
        self._written: torch.cuda.Event | None = None  # the newest write's end, for fetches on another stream

    @property
    def acknowledged(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self._epoch

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.Store`."""
        self._wait_for_writes()
        return self.table.gather(keys)

    def values(self, index: Tensor) -> Tensor:
        """See :meth:`RecordTable.values <torch_engram.stores.table.RecordTable.values>`."""
        self._wait_for_writes()
        return self.table.values(index)

    def _wait_for_writes(self) -> None:
        if self._written is not None:
            torch.cuda.current_stream(self.table.device).wait_event(self._written)

    def write(self, keys: Tensor, records: Tensor) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        self.table.scatter(keys, records)
        if self.table.device.type == "cuda":
            self._written = torch.cuda.current_stream(self.table.device).record_event()
        self._epoch += 1
        return self._epoch

    def flush(self) -> None:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        if self._written is not None:
            self._written.synchronize()
