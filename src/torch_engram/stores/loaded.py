"""Rows of tables in files, loaded into the memory of the device that computes: a read-only store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torch_engram.stores.codecs import CODECS
from torch_engram.stores.embedding import Columns, embed
from torch_engram.stores.file_rows import FileRows
from torch_engram.stores.records import RecordLayout
from torch_engram.stores.table import RecordTable

_CHUNK_ROWS = 1 << 16


class LoadedStore:
    """A read-only store of tables in files, by space, loaded in one pass over bounded pieces of them.

    ``layout``: of the records; rows in another codec are encoded again, rounded to nearest. ``device``: the one that
    holds them and that asks. Raises ``OSError`` naming the file that cannot be read.
    """

    grouped = False

    def __init__(self, tables: Mapping[int, FileRows], layout: RecordLayout, device: torch.device):
        self.layout, self.spaces = layout, {space: table.rows for space, table in tables.items()}
        self.table = RecordTable(layout, self.spaces, device)
        for space, table in tables.items():
            records = self.table.records[self.table.span(space)]
            for first in range(0, table.rows, _CHUNK_ROWS):
                load_rows(table, first, records[first : first + _CHUNK_ROWS], layout)
        self._plans: dict[tuple[tuple[int, ...], tuple[int, ...], int], tuple[Tensor, Columns]] = {}

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.Store`."""
        return self.table.gather(keys)

    def values(self, index: Tensor) -> Tensor:
        """See :meth:`RecordTable.values <torch_engram.stores.table.RecordTable.values>`."""
        return self.table.values(index)

    def read(self, spaces: Sequence[int], first_rows: Sequence[int], rows: Tensor, out: Tensor) -> Tensor:
        """The values that ``n`` positions read from ``S`` spaces, in ``out`` ``[S, n, C·dim]``; returns ``out``.

        ``rows``: int64 ``[S, n, C]``, all of them there, as addressing numbers them; ``first_rows``: of every space the
        number of its row 0. ``out`` has any floating type and any distance between positions. A call may be captured
        in a graph when there was one like it before.
        """
        offsets, columns = self._plan(tuple(spaces), tuple(first_rows), rows.shape[-1])
        where = (rows + offsets).flatten()
        return embed(self.layout, self.table.records, self.table.records[:0], where, columns, out)

    def _plan(self, spaces: tuple[int, ...], first_rows: tuple[int, ...], columns: int) -> tuple[Tensor, Columns]:
        """Constants of a read, on the device: what makes places in the table of row ids, and where they are read to."""
        key = spaces, first_rows, columns
        if key not in self._plans:
            device = self.table.device
            begins = [self.table.span(space).start - first for space, first in zip(spaces, first_rows, strict=True)]
            offsets = torch.tensor(begins, device=device)[:, None, None]
            self._plans[key] = offsets, Columns.of((1,) * columns, device)
        return self._plans[key]


def load_rows(table: FileRows, first: int, records: Tensor, layout: RecordLayout) -> None:
    """Put consecutive rows of a table, from ``first`` on, into zeroed ``records`` uint8 ``[n, nbytes]`` of ``layout``:
    holes of the files stay zeros, and are not read."""
    last = first + len(records)
    if table.layout != layout or not table.is_hole(first, last):
        records.copy_(reencode(table.read(first, last), table.layout, layout))


def reencode(records: Tensor, source: RecordLayout, target: RecordLayout) -> Tensor:
    """Records uint8 ``[n, nbytes]`` in the codecs of ``target``, rounded to nearest; both layouts have the same planes
    otherwise."""
    if source == target:
        return records
    result = target.empty(len(records), records.device)
    for plane in target.planes:
        parts = tuple(source.view(records, field) for field in source.fields if field.plane == plane.name)
        numbers = CODECS[source.plane(plane.name).codec].decode(parts)
        fields = [field for field in target.fields if field.plane == plane.name]
        for field, part in zip(fields, CODECS[plane.codec].encode(numbers), strict=True):
            target.view(result, field).copy_(part)
    return result
