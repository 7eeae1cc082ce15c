"""A cache by n-gram in the memory of the device that computes, in front of any store, for memories that are only read.

All rows of an n-gram's order are read together, so one look finds the records of all its heads, and nothing is sorted:
what addressing gives goes in, embeddings come out. A read has three parts, so that the host can bring one read's
missing rows while others are enqueued: :meth:`NgramCache.begin` looks for them, :meth:`NgramCache.bring` waits for
those that are missing, :meth:`NgramCache.place` puts them in place. A read may count on rows that the one before has
not got yet, so they are placed in line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_engram.sizes import parse_size
from torch_engram.stores.asks import Ask, new_ask
from torch_engram.stores.cached import Front, WritableFront, counted
from torch_engram.stores.embedding import Columns, embed
from torch_engram.stores.line import Line
from torch_engram.stores.protocol import Store, WritableStore
from torch_engram.stores.records import SPACE_SHIFT, RowFormat
from torch_engram.stores.slots import Found, Reads, Region, Slots


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


@dataclass(frozen=True)
class Begun:
    """A read whose rows are being looked for."""

    number: int
    """In the cache's line."""
    found: Found
    columns: Columns
    ask: Ask


class NgramCache(Front):
    """``store`` behind a cache of ``budget`` bytes, a number or such as ``"8GB"``, on ``device``.

    ``heads``: of every space that is read. ``row_format``: of the store's records. Every order of every space has an
    equal share. :meth:`read` goes through the cache, :meth:`fetch` passes it by. Room for what the largest reads so far
    could miss is kept beside the budget. Raises ``ValueError`` for a budget that is none or too small.
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
        self.device, self.format = torch.device(device), row_format
        self._heads = {each.space: each for each in heads}
        regions = [region for each in heads for region in each.regions()]
        self.slots = Slots(regions, self.layout.nbytes, parse_size(budget), self.device)
        self._plans: dict[tuple[int, ...], tuple[Tensor, Columns]] = {}
        self._asks: list[Ask] = []  # that no read has now
        self.line = Line(self.device)
        self._spoiled: tuple[int, BaseException | None] = (0, None)
        """Reads of lower numbers may have counted on rows that did not come, and why they did not."""

    def counts(self) -> dict[tuple[int, int], dict[str, int]]:
        """What was counted since the beginning, by (space, order), in n-grams: ``hits``, ``misses``, and those that
        another read of the same call had brought, ``repeats``; of the misses, ``evictions`` and ``overflow``."""
        return counted(self.slots)

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.Store`."""
        return self.store.fetch(keys)

    def read(self, spaces: Sequence[int], mixes: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        """The values that ``n`` positions read from ``S`` spaces, in ``out`` ``[S, n, C·dim]``; returns ``out``.

        ``mixes``: int64 ``[S, n, orders]``, from 0 to 2**63 - 2. ``rows``: int64 ``[S, n, C]``, the row ids of every
        order's heads, which are a function of space, order and mix. The spaces have the same heads. ``out`` has any
        floating type and any distance between positions.
        """
        begun = self.begin(spaces, mixes, rows)
        return self.place(begun, self.bring(begun), out)

    def begin(self, spaces: Sequence[int], mixes: Tensor, rows: Tensor) -> Begun:
        """Look for what :meth:`read` reads. What has begun has to be brought and put in place, or abandoned, on any
        thread: a further read waits here while too many are under way."""
        with self.line.join() as number:
            ask = self._free_ask(rows.numel())  # before anything is claimed, for there may be no memory for it
            self.slots.tick()
            found, columns = self.find(tuple(spaces), mixes, rows)
            try:
                ask.send(found.keys, found.count)
                ask.sent()
                if ask.reads:
                    with ask.beside():
                        ask.read()
            except BaseException:
                self.slots.release(found)
                raise
            return Begun(number, found, columns, ask)

    def find(self, spaces: tuple[int, ...], mixes: Tensor, rows: Tensor) -> tuple[Found, Columns]:
        """The part of :meth:`begin` that looks; may be captured in a graph. Every run of it stands in line, after a
        tick of the slots."""
        regions, columns = self._plan(spaces)
        tags, rows = mixes.reshape(-1), rows.reshape(-1, rows.shape[-1])
        return self.slots.find(Reads(tags, rows, regions, columns.groups, max(1, mixes.shape[1]))), columns

    def bring(self, begun: Begun) -> Tensor:
        """Have the host bring what is missing: records for :meth:`place`. Raises what the store's ``fetch`` does."""
        try:
            fetched = begun.ask.bring()
            if self.format.has_unwritten and begun.ask.alone:  # what is behind the last one is no row
                fetched = fetched[: int(begun.found.count[0])]
            return self.format.with_initial(begun.found.keys[: len(fetched)], fetched)
        except BaseException as error:
            self.abandon(begun, error)
            raise

    def place(self, begun: Begun, fetched: Tensor, out: Tensor) -> Tensor:
        """Fill ``out`` ``[S, n, C·dim]`` with what was begun and brought; returns ``out``. Raises what the store's
        ``fetch`` did for a read before this one."""
        with self.line.head(begun.number):
            self.require_unspoiled(begun.number, begun.found)
            self.slots.fill(begun.found, fetched)
            embed(self.layout, self.slots.records, fetched, begun.found.where, begun.columns, out)
            self._asks.append(begun.ask)
        return out

    def abandon(self, begun: Begun, error: BaseException) -> None:
        """Give up a read that has begun, for ``error``; those that have begun since fail for it, too."""
        with self.line.head(begun.number):
            self.spoil(begun.found, error)

    def spoil(self, found: Found, error: BaseException) -> None:
        """At the head of the line: the rows of ``found`` do not come."""
        self.slots.release(found)
        self._spoiled = self.line.issued, error

    def require_unspoiled(self, number: int, found: Found) -> None:
        """At the head of the line: raises what a read failed with that read ``number`` may have counted on."""
        before, error = self._spoiled
        if number < before and error is not None:
            self.slots.release(found)
            raise error

    def new_ask(self, capacity: int) -> Ask:
        """How missing rows are asked of the store, up to ``capacity`` at a time."""
        return new_ask(self.store, capacity, self.device)

    def _free_ask(self, capacity: int) -> Ask:
        """One that is large enough; smaller ones are let go."""
        self._asks = [ask for ask in self._asks if ask.capacity >= capacity]
        return self._asks.pop() if self._asks else self.new_ask(capacity)

    def _plan(self, spaces: tuple[int, ...]) -> tuple[Tensor, Columns]:
        """Constants of a read of some spaces, on the device."""
        if spaces not in self._plans:
            heads = [self._heads[space].per_order for space in spaces]
            assert all(each == heads[0] for each in heads), f"spaces {spaces} have other heads: {heads}"
            self._plans[spaces] = self.slots.plan(spaces), Columns.of(heads[0], self.device)
        return self._plans[spaces]


class WritableNgramCache(WritableFront, NgramCache):
    """An :class:`NgramCache` over a writable store, for rows that are loaded now and then: a write empties it."""

    def write(self, keys: Tensor, records: Tensor) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`. Returns when the write is acknowledged."""
        with self.line.alone():
            epoch = self.store.write(keys, records)
            self.store.flush()
            self.slots.clear()
        return epoch


def ngram_cache(
    store: Store, heads: Sequence[Heads], row_format: RowFormat, budget: int | str, device: torch.device | str
) -> NgramCache:
    """``store`` behind an :class:`NgramCache`, writable where it is."""
    made = WritableNgramCache if isinstance(store, WritableStore) else NgramCache
    return made(store, heads, row_format, budget, device)
