"""What a store is: integers in, encoded records out. It knows no token and no float.

A read-only store and a writable one are different types, so that a frozen table is refused where it is passed, not
at the first write. Writes are numbered by epochs: a fetch sees every write up to the epoch that the store had
acknowledged when the fetch began; whoever prefetches patches in the later ones (:mod:`torch_engram.memory.source`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from torch_engram.stores.records import RecordLayout


@runtime_checkable
class Store(Protocol):
    """Rows that can be read."""

    @property
    def layout(self) -> RecordLayout:
        """What a record holds."""

    @property
    def spaces(self) -> Mapping[int, int]:
        """Rows of every space."""

    @property
    def grouped(self) -> bool:
        """Whether :meth:`fetch` makes use of ``group``."""

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """Records uint8 ``[U, nbytes]`` of keys int64 ``[U]`` (space << 40 | row), on the keys' device.

        ``group``: int64 ``[U]``, the n-gram's mix that each key came from, for caches that hold the heads of one n-gram
        together. Given when ``grouped`` is true.
        """


@runtime_checkable
class WritableStore(Store, Protocol):
    """Rows that can be read and written."""

    @property
    def acknowledged(self) -> int:
        """Every write up to this epoch is in what a fetch that begins now reads."""

    def write(self, keys: Tensor, records: Tensor) -> int:
        """Replace the records of distinct keys; returns the write's epoch (1, 2, …), perhaps before it is done."""

    def flush(self) -> None:
        """Return when every write is acknowledged."""

    def wait(self, epoch: int) -> None:
        """Return when that write is acknowledged or has failed, or at once where that may take long. On any thread."""

    def changed(self, space: int) -> Tensor:
        """Rows of a space, int64 ascending on the CPU, that were written since :meth:`forget_changes`: what a save has
        to add to an earlier one. Call :meth:`flush` before."""

    def written(self, space: int) -> Tensor:
        """Rows of a space, int64 ascending on the CPU, that were ever written; all others are as the store was made.
        Call :meth:`flush` before."""

    @property
    def counts_from(self) -> int:
        """Number of the last :meth:`forget_changes`: who remembers another one does not know all changes."""

    def forget_changes(self) -> int:
        """The rows as they are now are saved: count changes from here on. Returns the new :attr:`counts_from`."""
