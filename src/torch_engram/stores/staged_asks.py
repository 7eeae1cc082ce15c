"""Asking tables on disk: rows are read into a pinned buffer that is kept, and go to a GPU with one copy.

Keys come to the host with the number of rows, so that nothing but that one event is waited for.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_engram.stores.pinned import pinned
from torch_engram.stores.slots import Found, Slots

if TYPE_CHECKING:
    from torch_engram.stores.disk import DiskStore


class StagedAsk:
    """See :class:`~torch_engram.stores.asks.Ask`: of up to ``capacity`` rows that ``device`` misses."""

    reads = alone = False

    def __init__(self, store: DiskStore, capacity: int, device: torch.device):
        self._store, self.capacity = store, capacity
        shape = capacity, store.layout.nbytes
        self._records = torch.empty(shape, dtype=torch.uint8, device=device)
        self.records: Tensor | None = self._records
        self._staged = pinned(shape, torch.uint8, device)
        self._keys = pinned((capacity,), torch.int64, device)
        self._count = pinned((2,), torch.int64, device)
        is_gpu = device.type == "cuda"
        self._sent, self._copied = (torch.cuda.Event() if is_gpu else None for _ in range(2))

    def send(self, keys: Tensor, count: Tensor) -> None:
        """See :class:`~torch_engram.stores.asks.Ask`."""
        most = min(len(keys), self.capacity)  # all of them, for the host does not know how many; more are never meant
        self._keys[:most].copy_(keys[:most], non_blocking=True)
        self._count.copy_(count, non_blocking=True)

    def sent(self) -> None:
        """See :class:`~torch_engram.stores.asks.Ask`."""
        if self._sent is not None:
            self._sent.record()

    def read(self) -> None:
        """Nothing."""

    def place(self, slots: Slots, found: Found) -> None:
        """Not for this one: the device is not alone."""
        raise NotImplementedError

    def beside(self) -> nullcontext[None]:
        """Nothing."""
        return nullcontext()

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
        self._store.fetch_into(self._keys[:count].numpy(), staged)
        records.copy_(staged, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return records

    def wait(self) -> None:
        """See :class:`~torch_engram.stores.asks.Ask`."""
        if self._sent is not None:
            self._sent.synchronize()

    def check(self) -> None:
        """Nothing: nobody leaves :meth:`bring` out."""
