"""Rows of a table divided over ranks: which rank holds a row, and which of its own rows that is.

A row id is a hash: its remainder spreads n-grams over the ranks evenly, those of every head and the frequent ones, too.
All of it is arithmetic on row ids and needs no process group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_engram.stores.protocol import WritableStore
from torch_engram.stores.records import ROW_MASK


@dataclass(frozen=True)
class Shard:
    """What rank ``rank`` of ``ranks`` holds: of every table the rows whose id leaves ``rank`` when divided by
    ``ranks``."""

    rank: int
    ranks: int

    def owners(self, rows: Tensor) -> Tensor:
        """The rank that holds each row."""
        return rows % self.ranks

    def own_number(self, rows: Tensor) -> Tensor:
        """Each row's number among those of the rank that holds it."""
        return rows // self.ranks

    def row(self, own: Tensor) -> Tensor:
        """Inverse of :meth:`own_number`, for rows of this rank."""
        return own * self.ranks + self.rank

    def count(self, rows: int) -> int:
        """How many of a table's ``rows`` this rank holds, perhaps none."""
        return (rows - self.rank + self.ranks - 1) // self.ranks

    def of(self, first: int, last: int) -> Tensor:
        """The rows of this rank from ``first`` to below ``last``, int64 ascending."""
        return self.row(torch.arange(self.count(first), self.count(last)))


class ShardedStore:
    """One rank's share of a table behind the keys of the whole table; every key that comes has to be this rank's.

    ``store`` holds the share, numbered by itself. ``spaces``: rows of the whole tables.
    """

    grouped = False

    def __init__(self, store: WritableStore, shard: Shard, spaces: Mapping[int, int]):
        self.store, self.shard = store, shard
        self.layout, self.spaces = store.layout, dict(spaces)

    def _own(self, keys: Tensor) -> Tensor:
        return keys & ~ROW_MASK | self.shard.own_number(keys & ROW_MASK)

    @property
    def acknowledged(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.store.acknowledged

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.Store`."""
        return self.store.fetch(self._own(keys))

    def write(self, keys: Tensor, records: Tensor) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.store.write(self._own(keys), records)

    def wait(self, epoch: int) -> None:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        self.store.wait(epoch)

    def flush(self) -> None:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        self.store.flush()

    def changed(self, space: int) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.shard.row(self.store.changed(space))

    def written(self, space: int) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.shard.row(self.store.written(space))

    @property
    def counts_from(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.store.counts_from

    def forget_changes(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.store.forget_changes()
