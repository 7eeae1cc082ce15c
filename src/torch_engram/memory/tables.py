"""Which tables a memory has: a layer's columns, split where the width of a row changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from torch_engram.addressing import LayerLayout
from torch_engram.config import EngramConfig


@dataclass(frozen=True)
class Table:
    """One row space of a memory: a layer's columns that share a row width."""

    layer: int
    space: int
    columns: slice
    first_row: int
    """Row id, in the layer's numbering, of this table's row 0."""
    rows: int
    dim: int
    orders: tuple[int, ...]
    """For each of the table's columns, the index of its order among the mixes."""


def tables_of(config: EngramConfig, layouts: Mapping[int, LayerLayout]) -> Iterator[Table]:
    """A memory's tables: a layer's columns, split where the row width changes from one order to the next; spaces number
    them."""
    sizes = zip(config.per_order("row_dim"), config.per_order("heads"), strict=True)
    columns = [(dim, order) for order, (dim, heads) in enumerate(sizes) for _ in range(heads)]
    space = 0
    for layer in config.layers:
        bounds = (*layouts[layer].offsets, layouts[layer].rows)
        first = 0
        for dim, run in groupby(columns, key=lambda column: column[0]):
            orders = tuple(order for _, order in run)
            last = first + len(orders)
            yield Table(layer, space, slice(first, last), bounds[first], bounds[last] - bounds[first], dim, orders)
            first, space = last, space + 1
