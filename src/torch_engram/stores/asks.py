"""Rows that kernels have found missing, asked for in the order of a stream and brought when the host gets to it.

An ask goes :meth:`Ask.send`, which only enqueues, then :meth:`Ask.sent`, then :meth:`Ask.bring` on any thread, which
waits until the device knows what is missing and no longer. What was enqueued in between runs meanwhile.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from torch_engram.stores.pinned import pinned
from torch_engram.stores.protocol import Store
from torch_engram.stores.slots import Found, Slots


class Ask(Protocol):
    """One batch of missing rows after another."""

    capacity: int
    """Rows of a batch, at most."""

    records: Tensor | None
    """uint8 ``[capacity, nbytes]``, where every batch is brought to; None where each has memory of its own."""

    reads: bool
    """Whether :meth:`read` does anything."""

    alone: bool
    """Whether :meth:`read` brings all of every batch, and :meth:`bring` waits for nothing."""

    def send(self, keys: Tensor, count: Tensor) -> None:
        """Say what is missing: the first ``count[0]``, of int64 ``[2]``, of ``keys``, both on the device. May be
        captured."""

    def sent(self) -> None:
        """:meth:`send`, or its replay, was enqueued on the current stream, and nothing after it that is not to be
        waited for."""

    def read(self) -> None:
        """Enqueue what the device brings of it by itself. May be captured. Belongs to every batch, after
        :meth:`send`."""

    def place(self, slots: Slots, found: Found) -> None:
        """In place of :meth:`read`, :meth:`bring` and :meth:`Slots.fill
        <torch_engram.stores.slots.Slots.fill>` where the device is :attr:`alone`: every row goes where it belongs at
        once, one without a place to :attr:`records`. May be captured."""

    def beside(self) -> AbstractContextManager[object]:
        """For :meth:`read`, or its replay, after :meth:`sent`: a stream of its own within the block, for which
        :meth:`bring` waits."""

    def bring(self) -> Tensor:
        """The records uint8 ``[count, nbytes]`` of the batch, on the device in the order of the current stream; where
        the device brings them :attr:`alone`, all that there is room for.

        Raises what the store's ``fetch`` does.
        """

    def wait(self) -> None:
        """Return when the device knows what is missing. Raises what the store's ``fetch`` does."""

    def check(self) -> None:
        """For who leaves out :meth:`bring`. Raises what the store's ``fetch`` does for a batch that is done."""


@runtime_checkable
class AskedStore(Store, Protocol):
    """A store that can be asked in a better way than :class:`PlainAsk`'s."""

    def new_ask(self, capacity: int, device: torch.device) -> Ask:
        """For up to ``capacity`` rows, missed on ``device``."""


def new_ask(store: Store, capacity: int, device: torch.device) -> Ask:
    """How ``store`` is asked by kernels on ``device``."""
    if device.type == "cuda" and isinstance(store, AskedStore):
        return store.new_ask(capacity, device)
    return PlainAsk(store, capacity, device)


class PlainAsk:
    """Fetches from any store, once the number of missing rows has come to the host."""

    records: Tensor | None = None
    reads = alone = False

    def __init__(self, store: Store, capacity: int, device: torch.device):
        self._store, self.capacity = store, capacity
        self._count = pinned((2,), torch.int64, device)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None

    def send(self, keys: Tensor, count: Tensor) -> None:
        """See :class:`Ask`."""
        self._keys = keys
        self._count.copy_(count, non_blocking=True)

    def sent(self) -> None:
        """See :class:`Ask`."""
        if self._sent is not None:
            self._sent.record()

    def read(self) -> None:
        """Nothing."""

    def place(self, slots: Slots, found: Found) -> None:
        """Not for this one."""
        raise AssertionError("the host has rows to bring")

    def beside(self) -> nullcontext[None]:
        """Nothing."""
        return nullcontext()

    def bring(self) -> Tensor:
        """See :class:`Ask`."""
        self.wait()
        count = int(self._count[0])
        if not count:
            return self._store.layout.empty(0, self._keys.device)
        return self._store.fetch(self._keys[:count])

    def wait(self) -> None:
        """See :class:`Ask`."""
        if self._sent is not None:
            self._sent.synchronize()

    def check(self) -> None:
        """Nothing: nobody leaves :meth:`bring` out."""
