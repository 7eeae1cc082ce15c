"""The tables that lookups are timed on, given or made of random rows, and a preset scaled to the rows they have."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch_engram.addressing import LayerLayout, layouts
from torch_engram.config import EngramConfig
from torch_engram.stores import CODECS
from torch_engram.stores.codecs import require_value_codec
from torch_engram.stores.layouts import LAYOUTS
from torch_engram.stores.named_tables import NamedTable, find_tables
from torch_engram.stores.synthetic import require_fitting, synthesise
from torch_engram.stores.tensor_files import tensors_in

_LAYER = "layer-"
_NATIVE = {"deepseek-v4.1": "deepseek-v4.1", "qwen-ple": "qwen4exp"}
"""The layout in which a preset's own tables come."""
_MOST_BYTES = 2_000_000_000
"""Of all tables that are made without a number of rows."""


def synthesise_layers(
    folder: Path, config: EngramConfig, rows: int | None, codec: str | None, tell: Callable[[int], None] | None = None
) -> dict[int, NamedTable]:
    """A table of random rows for every layer of ``config``, each in a folder of its own below ``folder``.

    ``rows``: of each layer; None for 2 GB in all, or a quarter of what the disk has left. ``codec``: None for the
    preset's own. Raises ``ValueError`` naming what does not fit.
    """
    layout = _NATIVE.get(config.fusion, "plain")
    codec = codec or LAYOUTS[layout].codecs[0]
    require_value_codec(codec)
    if codec != LAYOUTS[layout].codecs[0]:
        layout = "plain"
    width = config.per_order("row_dim")[0]
    rows = rows or _fitting_rows(folder, width, codec, len(config.layers))
    for layer in config.layers:
        require_fitting(folder / f"{_LAYER}{layer}", layout, rows, codec, 1)
    for layer in config.layers:
        beside = folder / f"{_LAYER}{layer}"
        synthesise(beside, layout, rows, width, codec, layer=layer, seed=layer, tell=tell)
    return tables_at(folder)


def _fitting_rows(folder: Path, width: int, codec: str, layers: int) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return max(1, min(_MOST_BYTES, shutil.disk_usage(there).free // 4) // (layers * row_bytes(codec, width)))


def tables_at(path: Path, first_layer: int = 0) -> dict[int, NamedTable]:
    """The tables by layer of a file or a folder: by their names, or as :func:`synthesise_layers` left them; a single
    table without a layer in its name is ``first_layer``'s. Raises ``ValueError`` when there is none."""
    by_folder = sorted(path.glob(f"{_LAYER}*")) if path.is_dir() else []
    if by_folder:
        return {int(one.name.removeprefix(_LAYER)): find_tables(tensors_in(one))[0] for one in by_folder}
    found = find_tables(tensors_in(path))
    if len(found) == 1 and found[0].layer is None:
        return {first_layer: found[0]}
    by_layer = {table.layer: table for table in found if table.layer is not None}
    if not by_layer:
        raise ValueError(f"{path} has {len(found)} tables without a layer in their names: give a file that has one.")
    return by_layer


def choose_layers(tables: Mapping[int, NamedTable], layers: Sequence[int]) -> dict[int, NamedTable]:
    """The tables of ``layers``, or all. Raises ``ValueError`` for a layer that has none."""
    for layer in layers:
        if layer not in tables:
            raise ValueError(f"There is no table of layer {layer}: choose of {', '.join(map(str, sorted(tables)))}.")
    return {layer: tables[layer] for layer in sorted(layers or tables)}


def row_bytes(codec: str, width: int) -> int:
    """Bytes of a row in files, all of its components together."""
    return sum(part.nbytes for part in CODECS[codec].components(width))


def scaled(config: EngramConfig, tables: Mapping[int, NamedTable]) -> tuple[EngramConfig, dict[int, LayerLayout]]:
    """``config`` for these tables, and its layouts: as it is where its rows are theirs, otherwise with as many rows a
    head as they have room for. Raises ``ValueError`` for tables that are too small."""
    (width, *others) = {table.width for table in tables.values()}
    if others:
        raise ValueError("The tables have rows of several widths: choose layers that are alike, with --layers.")
    config = replace(config, layers=tuple(sorted(tables)), row_dim=width)
    rows = {layer: table.rows for layer, table in tables.items()}
    own = layouts(config)
    if all(own[layer].rows == rows[layer] for layer in rows):
        return config, own
    heads, a_head = config.columns, min(rows.values()) // config.columns
    while a_head >= 2:
        config = replace(config, rows_per_head=a_head)
        own = layouts(config)
        excess = max(sum(layout.flat_primes) - rows[layer] for layer, layout in own.items())
        if excess <= 0:
            return config, {layer: replace(layout, rows=rows[layer]) for layer, layout in own.items()}
        a_head -= max(1, excess // heads)
    raise ValueError(f"{min(rows.values()):,} rows are too few for {heads} heads in {len(rows)} layers: give more.")
