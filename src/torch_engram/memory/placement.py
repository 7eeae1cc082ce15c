"""Where a bank's rows live: stores by the name of a placement, and the source behind every table."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from torch_engram.config import nearest
from torch_engram.memory.cached_reads import heads_of
from torch_engram.memory.source import Source
from torch_engram.memory.tables import Table
from torch_engram.sizes import parse_size
from torch_engram.stores import (
    CODECS,
    DeviceStore,
    DiskTable,
    HostStore,
    RecordLayout,
    RowFormat,
    Shard,
    ShardedStore,
    Store,
    WritableStore,
    cached,
    ngram_cache,
)
from torch_engram.stores.codecs import VALUE_CODECS, require_value_codec

StoreFactory = Callable[[RecordLayout, Mapping[int, int], torch.device], Store]
"""Makes a store for records, rows by space, and the device of the keys."""

PLACEMENTS: dict[str, StoreFactory] = {
    "device": DeviceStore,
    "host": lambda layout, spaces, device: HostStore(layout, spaces, for_gpu=device.type == "cuda"),
}
"""Of rows that a bank holds itself."""


def disk_rows(folder: str | os.PathLike[str], staging: int | str | None = None) -> StoreFactory:
    """A placement for training: rows and what the row optimiser keeps of them in files of ``folder``, a bank's own, on
    a disk. Files are made anew and go with the bank; what outlasts it is what is saved.

    ``staging``: bytes of host memory for blocks of the disk that were used lately, for every width of rows, a number or
    such as ``"8GB"``; by default an eighth of what is free. Steps that are under way should find room in it, 4 KiB for
    every distinct row, or blocks are read twice. The bank raises ``ValueError`` when another one has the folder, and
    ``OSError`` when files cannot be made there.
    """
    size = None if staging is None else parse_size(staging)
    return lambda layout, spaces, device: DiskTable(layout, spaces, Path(folder), size)


def make_sources(
    tables: Sequence[Table],
    formats: Sequence[RowFormat],
    make: StoreFactory,
    *,
    device: torch.device,
    name: str,
    trains: bool,
    cache: int | str | None = None,
    shard: Shard | None = None,
) -> list[Source]:
    """One source a table; tables whose records are alike share a store, and stores share the ``cache`` evenly.

    ``name``: the memory's. ``shard``: which of the rows are held here, where they are divided over ranks. Raises
    ``ValueError`` when its rows or the cache do not fit, or rows are to be trained in a read-only store.
    """
    share = None if cache is None else parse_size(cache) // len(set(formats))
    sources: dict[RowFormat, Source] = {}
    for own in formats:
        if own in sources:
            continue
        spaces = {table.space: table.rows for table, other in zip(tables, formats, strict=True) if other == own}
        held = spaces if shard is None else {space: shard.count(rows) for space, rows in spaces.items()}
        try:
            store = make(own.layout, held, device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            size = sum(held.values()) * own.layout.nbytes / 2**30
            state, smaller = (" with their optimiser state", "RowwiseAdam, ") if trains else ("", "")
            raise ValueError(
                f"The tables of memory {name!r} take {size:,.1f} GiB{state}, which {device} does not have: lower "
                f"rows_per_head, or use {smaller}codec='bf16' or placement='host'"
                f"{', or disk_rows(folder)' if trains else ''}."
            ) from error
        if trains and not isinstance(store, WritableStore):
            raise ValueError(f"{type(store).__name__} is read-only: leave out the optimizer, or use another store.")
        if share is not None:
            alike = [table for table, other in zip(tables, formats, strict=True) if other == own]
            store = _behind_cache(store, own, alike, share, device, trains)
        if shard is not None:
            assert isinstance(store, WritableStore), "only rows that are trained are divided over ranks"
            store = ShardedStore(store, shard, spaces)
        sources[own] = Source(store, own)
    return [sources[own] for own in formats]


def _behind_cache(
    store: Store, row_format: RowFormat, tables: Sequence[Table], budget: int, device: torch.device, trains: bool
) -> Store:
    """By row where rows are trained, by n-gram where they are only read."""
    try:
        if trains:
            return cached(store, budget, device)
        return ngram_cache(store, [heads_of(table) for table in tables], row_format, budget, device)
    except (MemoryError, RuntimeError) as error:  # a CPU's allocator raises no kind of its own
        raise ValueError(f"{device} has no {budget / 2**30:,.1f} GiB left for a cache: give it less.") from error


def require_known(codec: str, placement: str | StoreFactory, names: Collection[str] = PLACEMENTS) -> None:
    """Raises ``ValueError`` for a codec, or a placement that is none of ``names``, with the nearest one."""
    require_value_codec(codec)
    known = placement in names if isinstance(placement, str) else callable(placement)
    if not known:
        raise ValueError(f"There is no placement {placement!r}: {nearest(str(placement), names)}")


def require_trainable(codec: str) -> None:
    """Raises ``ValueError`` for a codec that loses small updates."""
    if not CODECS[codec].trains:
        trains = " or ".join(repr(name) for name in VALUE_CODECS if CODECS[name].trains)
        raise ValueError(f"codec={codec!r} rounds small updates away: train in {trains}, or leave out the optimizer.")
