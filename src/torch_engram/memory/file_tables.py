"""A bank's tables in safetensors files: which tensors are the rows of which layer, and the stores that serve them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import distributed

from torch_engram.config import nearest
from torch_engram.memory.placement import StoreFactory
from torch_engram.memory.saved import is_memory
from torch_engram.memory.tables import Table
from torch_engram.stores import DiskStore, FileRows, LoadedStore, RecordLayout, SharedHostStore, Store
from torch_engram.stores.codecs import require_value_codec
from torch_engram.stores.named_tables import NamedTable, table_named, tables_in
from torch_engram.stores.open_files import TensorFile
from torch_engram.stores.tensor_files import tensors_in

NEVER_WRITTEN = (
    "Tables in files are only read, and never written to: leave out the optimizer, or open a saved memory with another "
    "placement, such as disk_rows(folder)."
)
IN_PLACE = {"disk": False, "disk-direct": True}
"""Placements that read files in place, and whether past the page cache."""
LOADED = ("host", "host-shared", "device")
"""Placements that load files."""

Tables = str | os.PathLike[str] | Mapping[int, NamedTable | tuple[str | os.PathLike[str], str]]
"""A file or a folder of shards whose tensors' names say their layers; or for every layer its table, or file (or folder)
and name of its tensor."""


class FileTables:
    """The rows of every table of a memory, in files; ``wanted``: the memory's tables.

    ``codec``: what the rows shall be in, None for what the files have; ``placement``: as for
    :class:`~torch_engram.memory.MemoryBank`. Raises ``ValueError`` naming what does not fit.
    """

    def __init__(self, tables: Tables, wanted: Sequence[Table], codec: str | None, placement: str | StoreFactory):
        if not isinstance(placement, str) or placement not in (*IN_PLACE, *LOADED):
            raise ValueError(
                f"There is no placement {placement!r} for tables in files: {nearest(str(placement), _placements())}"
            )
        self._placement = placement
        found = dict(_by_space(tables, wanted))
        codecs = sorted({table.codec for table in found.values()})
        if codec is None and len(codecs) > 1:
            raise ValueError(f"The tables are in {' and '.join(codecs)}: load all in one, such as codec='bf16'.")
        self.codec = codec or codecs[0]
        require_value_codec(self.codec)
        if placement in IN_PLACE and codecs != [self.codec]:
            raise ValueError(
                f"The tables are in {' and '.join(codecs)}, and rows that are read in place stay so: leave out "
                f"codec={codec!r}, or use placement='host' or 'device'."
            )
        opened: dict[Path, TensorFile] = {}
        self.rows = {space: FileRows.of(table, opened) for space, table in found.items()}
        """By space."""

    def make_store(self, layout: RecordLayout, spaces: Mapping[int, int], device: torch.device) -> Store:
        """A :data:`~torch_engram.memory.placement.StoreFactory` of read-only stores."""
        rows = {space: self.rows[space] for space in spaces}
        if self._placement in IN_PLACE:
            return DiskStore(rows, direct=IN_PLACE[self._placement])
        where = device if self._placement == "device" else torch.device("cpu")
        try:
            if self._placement == "device":
                return LoadedStore(rows, layout, device)
            own = self._placement == "host" and device.type == "cuda" and _is_alone()
            return SharedHostStore(rows, layout, shared=not own)
        except (MemoryError, torch.OutOfMemoryError) as error:
            size = sum(table.rows for table in rows.values()) * layout.nbytes / 2**30
            raise ValueError(
                f"The tables take {size:,.1f} GiB, which {where} does not have: read them in place (placement='disk')."
            ) from error


def _is_alone() -> bool:
    """Whether this process is the only one of its launch on this machine, as far as launchers say."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return not several and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1


def _placements() -> list[str]:
    return [*IN_PLACE, *LOADED]


def _by_space(tables: Tables, wanted: Sequence[Table]) -> Iterator[tuple[int, NamedTable]]:
    """The table in files of each of the memory's, both of one size."""
    layers = [table.layer for table in wanted]
    for layer in layers:
        if layers.count(layer) > 1:
            raise ValueError(
                f"Layer {layer} has rows of several widths, which no table in files has: give one row_dim."
            )
    by_layer = _by_layer(tables, layers)
    for own in wanted:
        found = by_layer[own.layer]
        if (found.rows, found.width) != (own.rows, own.dim):
            raise ValueError(
                f"{found.name} has {found.rows:,} rows of {found.width} numbers, and layer {own.layer} of this "
                f"configuration {own.rows:,} of {own.dim}: give the configuration that the table was made with (heads, "
                "rows_per_head, row_dim, and row_multiple where rows are padded)."
            )
        yield own.space, found


def _by_layer(tables: Tables, layers: Sequence[int]) -> Mapping[int, NamedTable]:
    """The table of every layer, and perhaps more."""
    if isinstance(tables, Mapping):
        found = {layer: _named(table) for layer, table in tables.items()}
        whose = "The mapping"
    else:
        if not isinstance(tables, str | os.PathLike) or not os.fspath(tables):
            raise ValueError(f"tables= is a file, a folder of shards or a mapping of layers to tables, not {tables!r}.")
        path = Path(tables)
        if is_memory(path):
            raise ValueError(f"{path} is a saved memory: open it with open_bank(), which takes the same placements.")
        all_found = tables_in(path)
        found = {table.layer: table for table in all_found if table.layer is not None}
        if len(all_found) == len(layers) == 1 and not found:
            return {layers[0]: all_found[0]}  # there is no other choice
        whose = str(path)
    for layer in layers:
        if layer not in found:
            others = ", ".join(map(str, sorted(found))) or "no layer"
            raise ValueError(
                f"{whose} has tables of {others}, and none of layer {layer}: give tables={{{layer}: (path, tensor)}}, "
                "or the configuration's own layers."
            )
    return found


def _named(table: NamedTable | tuple[str | os.PathLike[str], str]) -> NamedTable:
    if isinstance(table, NamedTable):
        return table
    if not isinstance(table, tuple | list) or len(table) != 2 or not isinstance(table[1], str):
        raise ValueError(f"A layer's table is a NamedTable or a pair (path, name of the tensor), not {table!r}.")
    path, name = table
    return table_named(tensors_in(Path(path)), name)
