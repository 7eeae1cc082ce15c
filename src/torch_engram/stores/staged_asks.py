"""Asking tables on disk: rows are read into a pinned buffer that is kept, and go to a GPU with one copy.

Keys come to the host with the number of rows, so that nothing but that one event is waited for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_engram.stores.asks import PlainAsk
from torch_engram.stores.pinned import pinned

if TYPE_CHECKING:
    from torch_engram.stores.disk import DiskStore


class StagedAsk(PlainAsk):
    """See :class:`~torch_engram.stores.asks.Ask`: of up to ``capacity`` rows that ``device`` misses."""

    def __init__(self, store: DiskStore, capacity: int, device: torch.device):
        super().__init__(store, capacity, device)
        self._disk, shape = store, (capacity, store.layout.nbytes)
        self._records = torch.empty(shape, dtype=torch.uint8, device=device)
        self.records = self._records
        self._staged = pinned(shape, torch.uint8, device)
        self._wanted = pinned((capacity,), torch.int64, device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def send(self, keys: Tensor, count: Tensor) -> None:
        """See :class:`~torch_engram.stores.asks.Ask`."""
        most = min(len(keys), self.capacity)  # all of them, for the host does not know how many; more are never meant
        self._wanted[:most].copy_(keys[:most], non_blocking=True)
        super().send(keys, count)

    def bring(self) -> Tensor:
        """See :class:`~torch_engram.stores.asks.Ask`."""
        self.wait()
        count = int(self._count[0])
        records = self._records[:count]
        if not count:
            return records
        if self._copied is not None:  # what was staged before may be on its way still
            self._copied.synchronize()
        staged = self._staged[:count]
        self._disk.fetch_into(self._wanted[:count].numpy(), staged)
        records.copy_(staged, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return records
