"""Where a bank's rows live: stores by the name of a placement, and the source behind every table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from torch_engram.config import nearest
from torch_engram.memory.source import Source
from torch_engram.memory.tables import Table
from torch_engram.stores import CODECS, DeviceStore, HostStore, RecordLayout, RowFormat, Store, WritableStore

StoreFactory = Callable[[RecordLayout, Mapping[int, int], torch.device], Store]
"""Makes a store for records, rows by space, and the device of the keys."""

PLACEMENTS: dict[str, StoreFactory] = {
    "device": DeviceStore,
    "host": lambda layout, spaces, device: HostStore(layout, spaces, pinned=device.type == "cuda"),
}
"""Of rows that a bank holds itself."""


def make_sources(
    tables: Sequence[Table],
    formats: Sequence[RowFormat],
    make: StoreFactory,
    *,
    device: torch.device,
    name: str,
    trains: bool,
) -> list[Source]:
    """One source a table; tables whose records are alike share a store.

    ``name``: the memory's. Raises ``ValueError`` when its rows do not fit, or are to be trained in a read-only store.
    """
    sources: dict[RowFormat, Source] = {}
    for own in formats:
        if own in sources:
            continue
        spaces = {table.space: table.rows for table, other in zip(tables, formats, strict=True) if other == own}
        try:
            store = make(own.layout, spaces, device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            size = sum(spaces.values()) * own.layout.nbytes / 2**30
            state, smaller = (" with their optimiser state", "RowwiseAdam, ") if trains else ("", "")
            raise ValueError(
                f"The tables of memory {name!r} take {size:,.1f} GiB{state}, which {device} does not have: lower "
                f"rows_per_head, or use {smaller}codec='bf16' or placement='host'."
            ) from error
        if trains and not isinstance(store, WritableStore):
            raise ValueError(f"{type(store).__name__} is read-only: leave out the optimizer, or use another store.")
        sources[own] = Source(store, own)
    return [sources[own] for own in formats]


def require_known(codec: str, placement: str | StoreFactory) -> None:
    """Raises ``ValueError`` for a codec or a placement that is none, with the nearest one."""
    require_codec(codec)
    if isinstance(placement, str) and placement not in PLACEMENTS:
        raise ValueError(f"There is no placement {placement!r}: {nearest(placement, PLACEMENTS)}")


def require_codec(codec: str) -> None:
    """Raises ``ValueError`` for a codec that holds no values, with the nearest one."""
    holds_values = [name for name in CODECS if name != "int32"]
    if codec not in holds_values:
        raise ValueError(f"There is no codec {codec!r} for values: {nearest(codec, holds_values)}")


def require_trainable(codec: str) -> None:
    """Raises ``ValueError`` for a codec that loses small updates."""
    if not CODECS[codec].trains:
        trains = " or ".join(repr(name) for name, known in CODECS.items() if known.trains and name != "int32")
        raise ValueError(f"codec={codec!r} rounds small updates away: train in {trains}, or leave out the optimizer.")
