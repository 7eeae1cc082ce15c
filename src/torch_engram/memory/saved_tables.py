"""How a bank's tables go to disk and come back: by one process, or by all ranks that hold a share of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from torch_engram.memory.bank import MemoryBank
from torch_engram.memory.exchange import Exchange
from torch_engram.memory.saved_shards import only_held, save_shards, save_touched_shards, update_shards
from torch_engram.memory.tables import Table
from torch_engram.stores import (
    Manifest,
    WritableStore,
    check_table,
    load_table,
    make_keys,
    save_table,
    save_touched,
    update_table,
)
from torch_engram.stores.parts import CHUNK_ROWS


class SavedTables(Protocol):
    """What is done by whoever holds the rows; with ranks, every call is collective."""

    @property
    def leads(self) -> bool:
        """Whether this process does what only one may do."""

    def together(self) -> AbstractContextManager[None]:
        """Within, a failure of one is a failure of all; none leaves before the last one does."""

    def all(self, mine: bool) -> bool:
        """Whether it is so everywhere."""

    def save(self, folder: Path, table: Table) -> Manifest:
        """See :func:`~torch_engram.stores.save_table`."""

    def save_touched(self, folder: Path, table: Table) -> Manifest:
        """See :func:`~torch_engram.stores.save_touched`."""

    def update(self, folder: Path, table: Table, earlier: Manifest) -> Manifest:
        """See :func:`~torch_engram.stores.update_table`."""

    def check(self, folder: Path, table: Table, manifest: Manifest) -> None:
        """See :func:`~torch_engram.stores.check_table`."""

    def load(self, folder: Path, table: Table, manifest: Manifest) -> None:
        """See :func:`~torch_engram.stores.load_table`; rows that are in no file become zeros."""


def saved_tables(bank: MemoryBank) -> SavedTables:
    """Of one process, or of the ranks among which the rows are divided."""
    return OneHolder(bank) if bank.exchange is None else AllRanks(bank, bank.exchange)


class OneHolder:
    """See :class:`SavedTables`."""

    leads = True

    def __init__(self, bank: MemoryBank):
        self._bank = bank

    def together(self) -> AbstractContextManager[None]:
        """See :class:`SavedTables`."""
        return nullcontext()

    def all(self, mine: bool) -> bool:
        """See :class:`SavedTables`."""
        return mine

    def save(self, folder: Path, table: Table) -> Manifest:
        """See :class:`SavedTables`."""
        return save_table(folder, table.rows, self._bank.source(table).format.layout, _reader(self._bank, table))

    def save_touched(self, folder: Path, table: Table) -> Manifest:
        """See :class:`SavedTables`."""
        layout, read = self._bank.source(table).format.layout, _reader(self._bank, table)
        return save_touched(folder, table.rows, _touched(self._bank, table), layout, read)

    def update(self, folder: Path, table: Table, earlier: Manifest) -> Manifest:
        """See :class:`SavedTables`."""
        layout = self._bank.source(table).format.layout
        return update_table(folder, earlier, _changed(self._bank, table), layout, _reader(self._bank, table))

    def check(self, folder: Path, table: Table, manifest: Manifest) -> None:
        """See :class:`SavedTables`."""
        check_table(folder, manifest, table.rows, self._bank.source(table).format.layout)

    def load(self, folder: Path, table: Table, manifest: Manifest) -> None:
        """See :class:`SavedTables`."""
        if manifest.touched is not None:
            _clear(self._bank, table)
        load_table(folder, manifest, self._bank.source(table).format.layout, writer_of(self._bank, table))


class AllRanks:
    """See :class:`SavedTables`."""

    def __init__(self, bank: MemoryBank, exchange: Exchange):
        self._bank, self._exchange = bank, exchange
        self.leads = exchange.shard.rank == 0

    def together(self) -> AbstractContextManager[None]:
        """See :class:`SavedTables`."""
        return self._exchange.together()

    def all(self, mine: bool) -> bool:
        """See :class:`SavedTables`."""
        return self._exchange.all(mine)

    def save(self, folder: Path, table: Table) -> Manifest:
        """See :class:`SavedTables`."""
        layout = self._bank.source(table).format.layout
        return save_shards(self._exchange, folder, table.rows, layout, _reader(self._bank, table))

    def save_touched(self, folder: Path, table: Table) -> Manifest:
        """See :class:`SavedTables`."""
        layout, own = self._bank.source(table).format.layout, _touched(self._bank, table)
        return save_touched_shards(self._exchange, folder, table.rows, own, layout, _reader(self._bank, table))

    def update(self, folder: Path, table: Table, earlier: Manifest) -> Manifest:
        """See :class:`SavedTables`."""
        layout, own = self._bank.source(table).format.layout, _changed(self._bank, table)
        return update_shards(self._exchange, folder, earlier, own, layout, _reader(self._bank, table))

    def check(self, folder: Path, table: Table, manifest: Manifest) -> None:
        """See :class:`SavedTables`; each rank reads a share of the parts."""
        shard = self._exchange.shard
        mine = manifest.parts[shard.rank :: shard.ranks]
        check_table(folder, manifest, table.rows, self._bank.source(table).format.layout, mine)

    def load(self, folder: Path, table: Table, manifest: Manifest) -> None:
        """See :class:`SavedTables`."""
        if manifest.touched is not None:
            _clear(self._bank, table)
        write = only_held(self._exchange.shard, writer_of(self._bank, table))
        load_table(folder, manifest, self._bank.source(table).format.layout, write)


def _changed(bank: MemoryBank, table: Table) -> Tensor:
    """Rows of a table that were written since its store counts."""
    store = bank.source(table).store
    assert isinstance(store, WritableStore), "a store that cannot be written has no changes"
    return store.changed(table.space)


def _touched(bank: MemoryBank, table: Table) -> Tensor:
    """Rows of a table that are not all zeros, int64 ascending; only rows that were ever written are looked at."""
    store, read = bank.source(table).store, _reader(bank, table)
    written = store.written(table.space) if isinstance(store, WritableStore) else torch.arange(table.rows)
    kept = [rows[(read(rows).view(torch.int64) != 0).any(1).cpu()] for rows in written.split(CHUNK_ROWS)]
    return torch.cat(kept)


def _clear(bank: MemoryBank, table: Table) -> None:
    """Make all rows zeros, which rows that were never written are."""
    source = bank.source(table)
    assert isinstance(source.store, WritableStore), "a store that cannot be written is not loaded into"
    for rows in source.store.written(table.space).split(CHUNK_ROWS):
        writer_of(bank, table)(rows, source.format.layout.empty(len(rows)))


def _reader(bank: MemoryBank, table: Table) -> Callable[[Tensor], Tensor]:
    store = bank.source(table).store
    return lambda rows: store.fetch(make_keys(table.space, rows.to(bank.device)))


def writer_of(bank: MemoryBank, table: Table) -> Callable[[Tensor, Tensor], None]:
    """Replaces rows int64 ``[n]`` of a table, of which no step is under way, by their records. Raises ``ValueError``
    where they can only be read."""
    source = bank.source(table)
    store = source.store
    if not isinstance(store, WritableStore):
        raise ValueError(f"{type(store).__name__} is read-only: rows cannot be loaded into it.")

    def write(rows: Tensor, records: Tensor) -> None:
        source.newest = store.write(make_keys(table.space, rows.to(bank.device)), records.to(bank.device))

    return write
