"""Tables as they are read in order to be written anew: run after run of consecutive rows, in the bytes they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torch_engram.stores.file_rows import FileRows
from torch_engram.stores.layouts import plain_name
from torch_engram.stores.named_tables import tables_in
from torch_engram.stores.open_files import OpenFile, TensorFile
from torch_engram.stores.protocol import Store
from torch_engram.stores.records import Plane, RowFormat, make_keys


class StoreRows:
    """A table's rows out of a store, as they are when they are read; those of :class:`FileRows` are in files."""

    files: Sequence[OpenFile] = ()

    def __init__(self, store: Store, space: int, rows: int, device: torch.device):
        self.rows, self._store, self._space, self._device = rows, store, space, device

    def read(self, first: int, last: int) -> Tensor:
        """Records uint8 ``[last - first, nbytes]`` of consecutive rows, on the CPU."""
        rows = torch.arange(first, last, device=self._device)
        return self._store.fetch(make_keys(self._space, rows)).cpu()

    def read_apart(self, first: int, last: int) -> tuple[Tensor, ...]:
        """As :meth:`FileRows.read_apart`."""
        records, layout = self.read(first, last), self._store.layout
        return tuple(layout.view(records, field) for field in layout.fields)


@dataclass(frozen=True)
class RowSource:
    """One table that can be read through."""

    table: FileRows | StoreRows
    format: RowFormat
    """Of its records; says what the rows are that were never written."""
    name: str
    """What its tensor is called in the layout ``plain``."""
    layout: str
    """Of :data:`LAYOUTS`: in which it is, or the one to be written when nobody asks for another."""
    layer: int | None
    """None where nothing says one."""
    space: int = 0
    """As :attr:`format` counts."""
    facts: tuple[OpenFile, ...] = ()
    """Files without rows that say what the rows are."""

    @property
    def _plane(self) -> Plane:
        return self.format.layout.plane("value")

    @property
    def codec(self) -> str:
        """Of its rows."""
        return self._plane.codec

    @property
    def width(self) -> int:
        """Numbers a row."""
        return self._plane.width

    @property
    def rows(self) -> int:
        """Of the whole table."""
        return self.table.rows

    @property
    def files(self) -> Sequence[OpenFile]:
        """All that it is read from."""
        return *self.facts, *self.table.files

    def read(self, rows: range) -> tuple[Tensor, ...]:
        """The components ``[len(rows), component.width]`` of consecutive rows, encoded.

        Raises what :meth:`FileRows.read` does.
        """
        layout = self.format.layout
        if self.format.init_std:
            records = self.table.read(rows.start, rows.stop)
            self.format.with_initial(make_keys(self.space, torch.arange(rows.start, rows.stop)), records)
            parts = tuple(layout.view(records, field) for field in layout.fields)
        else:
            parts = self.table.read_apart(rows.start, rows.stop)
        return tuple(part for field, part in zip(layout.fields, parts, strict=True) if field.plane == "value")

    def require_in_place(self) -> None:
        """Raises :class:`~torch_engram.stores.open_files.ChangedFile` unless its files are under their names still, as
        they were."""
        for file in self.files:
            file.require_in_place()


def named_rows(path: Path) -> list[RowSource]:
    """Every table in a file or a folder of shards.

    Raises ``ValueError`` as :func:`tables_in` and :meth:`FileRows.of` do.
    """
    opened: dict[Path, TensorFile] = {}
    found = []
    for table in tables_in(path):
        layout, rows = table.layout.lower(), FileRows.of(table, opened)
        # one of a known layout is called by its layer
        name = table.name if table.layer is None or layout == "plain" else plain_name(table.layer)
        found.append(RowSource(rows, RowFormat(rows.layout), name, layout, table.layer))
    return found
