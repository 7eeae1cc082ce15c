"""A cache by n-gram in the memory of the device that computes, in front of any store, for memories that are only read.

All rows of an n-gram's order are read together, so one look finds the records of all its heads, and nothing is sorted:
what addressing gives goes in, embeddings come out. While all n-grams are found, that is three launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_engram.sizes import parse_size
from torch_engram.stores.cached import Front, WritableFront, counted
from torch_engram.stores.embedding import Columns, embed
from torch_engram.stores.protocol import Store, WritableStore
from torch_engram.stores.records import SPACE_SHIFT, RowFormat
from torch_engram.stores.slots import Reads, Region, Slots
from torch_engram.stores.turns import Turns


@dataclass(frozen=True)
class Heads:
    """How the rows of one space are read: ``per_order`` of them for each n-gram order, lowest first.

    ``first_row``: the row id, as addressing numbers them, of the space's row 0.
    """

    space: int
    per_order: tuple[int, ...]
    first_row: int = 0

    def regions(self) -> list[Region]:
        """A kind of entry for each order."""
        offset = (self.space << SPACE_SHIFT) - self.first_row
        begins = [sum(self.per_order[:order]) for order in range(len(self.per_order))]
        return [
            Region(self.space, order, parts, first, offset)
            for order, (parts, first) in enumerate(zip(self.per_order, begins, strict=True))
        ]


class NgramCache(Front):
    """``store`` behind a cache of ``budget`` bytes, a number or such as ``"8GB"``, on ``device``.

    ``heads``: of every space that is read. ``row_format``: of the store's records. Every order of every space has an
    equal share. :meth:`read` goes through the cache, :meth:`fetch` passes it by. Raises ``ValueError`` for a budget
    that is none or too small.
    """

    grouped = True
    """Mixes are wanted, for :meth:`read`."""

    def __init__(
        self,
        store: Store,
        heads: Sequence[Heads],
        row_format: RowFormat,
        budget: int | str,
        device: torch.device | str,
    ):
        super().__init__(store)
        self.device, self._format = torch.device(device), row_format
        self._heads = {each.space: each for each in heads}
        regions = [region for each in heads for region in each.regions()]
        self._slots = Slots(regions, self.layout.nbytes, parse_size(budget), self.device)
        self._plans: dict[tuple[int, ...], tuple[Tensor, Columns]] = {}
        self._turns = Turns(self.device)

    def counts(self) -> dict[tuple[int, int], dict[str, int]]:
        """What was counted since the beginning, by (space, order), in n-grams: ``hits``, ``misses``, and those that
        another read of the same call had brought, ``repeats``; of the misses, ``evictions`` and ``overflow``."""
        return counted(self._slots)

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.Store`."""
        return self.store.fetch(keys)

    def read(self, spaces: Sequence[int], mixes: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        """The values that ``n`` positions read from ``S`` spaces, in ``out`` ``[S, n, C·dim]``; returns ``out``.

        ``mixes``: int64 ``[S, n, orders]``, from 0 to 2**63 - 2. ``rows``: int64 ``[S, n, C]``, the row ids of every
        order's heads, which are a function of space, order and mix. The spaces have the same heads. ``out`` has any
        floating type and any distance between positions.
        """
        regions, columns = self._plan(tuple(spaces))
        reads = Reads(
            mixes.reshape(-1), rows.reshape(-1, rows.shape[-1]), regions, columns.groups, max(1, mixes.shape[1])
        )
        with self._turns.turn():
            try:
                found = self._slots.find(reads)
                fetched = self.layout.empty(0, self.device)
                if len(found.keys):
                    fetched = self._format.with_initial(found.keys, self.store.fetch(found.keys))
                    self._slots.fill(found, fetched)
            except BaseException:
                self._slots.release()
                raise
            return embed(self.layout, self._slots.records, fetched, found.where, columns, out)

    def _plan(self, spaces: tuple[int, ...]) -> tuple[Tensor, Columns]:
        """Constants of a read of some spaces, on the device."""
        if spaces not in self._plans:
            heads = [self._heads[space].per_order for space in spaces]
            assert all(each == heads[0] for each in heads), f"spaces {spaces} have other heads: {heads}"
            self._plans[spaces] = self._slots.plan(spaces), Columns.of(heads[0], self.device)
        return self._plans[spaces]


class WritableNgramCache(WritableFront, NgramCache):
    """An :class:`NgramCache` over a writable store, for rows that are loaded now and then: a write empties it."""

    def write(self, keys: Tensor, records: Tensor) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`. Returns when the write is acknowledged."""
        with self._turns.turn():
            epoch = self.store.write(keys, records)
            self.store.flush()
            self._slots.clear()
        return epoch


def ngram_cache(
    store: Store, heads: Sequence[Heads], row_format: RowFormat, budget: int | str, device: torch.device | str
) -> NgramCache:
    """``store`` behind an :class:`NgramCache`, writable where it is."""
    made = WritableNgramCache if isinstance(store, WritableStore) else NgramCache
    return made(store, heads, row_format, budget, device)
