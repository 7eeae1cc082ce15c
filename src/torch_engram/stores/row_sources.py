"""Tables as they are read in order to be written anew: run after run of consecutive rows, in the bytes they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from torch_engram.stores.codecs import CODECS
from torch_engram.stores.layouts import plain_name
from torch_engram.stores.named_tables import NamedTable, find_tables
from torch_engram.stores.steady_files import ChangedFile, SteadyFile
from torch_engram.stores.tensor_files import TensorPlace, tensors_in


class RowSource(Protocol):
    """One table that can be read through."""

    @property
    def name(self) -> str:
        """What its tensor is called in the layout ``plain``."""

    @property
    def layout(self) -> str:
        """Of :data:`LAYOUTS`: in which it is, or the one to be written when nobody asks for another."""

    @property
    def layer(self) -> int | None:
        """None where nothing says one."""

    @property
    def codec(self) -> str:
        """Of its rows."""

    @property
    def width(self) -> int:
        """Numbers a row."""

    @property
    def rows(self) -> int:
        """Of the whole table."""

    @property
    def files(self) -> Sequence[SteadyFile]:
        """All that it is read from."""

    def read(self, rows: range) -> tuple[Tensor, ...]:
        """The components ``[len(rows), component.width]`` of consecutive rows, encoded.

        Raises :class:`ChangedFile` when a file is no longer what it was.
        """


class NamedRows:
    """A table in safetensors files."""

    def __init__(self, table: NamedTable, files: Mapping[Path, SteadyFile]):
        self._table, self._files = table, files
        self.layout, self.layer = table.layout.lower(), table.layer
        self.codec, self.width, self.rows = table.codec, table.width, table.rows

    @property
    def name(self) -> str:
        """See :class:`RowSource`. One of a known layout is called by its layer."""
        return self._table.name if self.layer is None or self.layout == "plain" else plain_name(self.layer)

    @property
    def files(self) -> Sequence[SteadyFile]:
        """See :class:`RowSource`."""
        return [self._files[file] for file in self._table.files]

    def read(self, rows: range) -> tuple[Tensor, ...]:
        """See :class:`RowSource`."""
        parts = CODECS[self.codec].components(self.width)
        found = []
        for part, places in zip(parts, (self._table.values, self._table.scales), strict=False):
            into = torch.empty(len(rows), part.nbytes, dtype=torch.uint8)
            self._fill(into, places, rows)
            found.append(into.view(part.dtype))
        return tuple(found)

    def _fill(self, into: Tensor, places: Sequence[TensorPlace], rows: range) -> None:
        for place, end in zip(places, self._ends, strict=True):
            begin = end - place.shape[0]
            first, last = max(begin, rows.start), min(end, rows.stop)
            if first < last:
                run = into[first - rows.start : last - rows.start]
                self._files[place.file].read_rows(run, place, first - begin)

    @cached_property
    def _ends(self) -> list[int]:
        """The row after each tensor's last."""
        return list(accumulate(place.shape[0] for place in self._table.values))


def named_rows(path: Path) -> list[NamedRows]:
    """Every table in a file or a folder of shards.

    Raises ``ValueError`` as :func:`tensors_in` and :func:`find_tables` do, or when there is none.
    """
    tables = find_tables(tensors_in(path))
    if not tables:
        raise ValueError(f"{path} has no matrix that could be a table: give the files of the tables.")
    files = {file: SteadyFile(file) for table in tables for file in table.files}
    if find_tables(tensors_in(path)) != tables:  # headers are of the very files whose identity was taken
        raise ChangedFile(f"The files of {path} are being written: begin anew when they are whole.")
    return [NamedRows(table, files) for table in tables]
