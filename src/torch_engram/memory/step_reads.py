"""The reads of a step of decoding out of tables in the memory of the device that computes: at once, by whoever asks.

There is nothing to bring, and to wake a thread takes longer than so few rows do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_engram.addressing import Lookup
from torch_engram.memory.source import Source
from torch_engram.memory.tables import Table
from torch_engram.stores import DecodedRows, DeviceStore, LoadedStore
from torch_engram.stores.records import SPACE_SHIFT


def reads_at_once(sources: Sequence[Source], device: torch.device) -> bool:
    """Whether all rows are in the memory of ``device``, with no write that is not among them."""
    stores = [source.store for source in sources]
    return all(isinstance(store, DeviceStore | LoadedStore) and store.table.device == device for store in stores)


class StepReads:
    """Of a bank that :func:`reads_at_once`; the embeddings are of ``dtype``."""

    def __init__(self, tables: Sequence[Table], sources: Sequence[Source], dtype: torch.dtype):
        self._layers, self._dtype = list(dict.fromkeys(table.layer for table in tables)), dtype
        each = len(tables) // len(self._layers)
        self._alike = [_Alike(tables[first::each], sources[first]) for first in range(each)]

    def read(self, lookup: Lookup, live: Tensor | None) -> dict[int, Tensor]:
        """Every layer's embeddings ``[B, T, E]``; those of positions that are not live, bool ``[B, T]``, are zero."""
        _, rows = lookup.of(self._layers)
        parts = [alike.read(rows) for alike in self._alike]
        whole = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(self._dtype)
        if live is not None:
            whole = torch.where(live.to(whole.device)[..., None], whole, 0)
        return dict(zip(self._layers, whole, strict=True))


class _Alike:
    """Tables of all layers that have the same columns, and so one store."""

    def __init__(self, tables: Sequence[Table], source: Source):
        assert isinstance(source.store, DeviceStore | LoadedStore), "rows are read at once where they are"
        self._columns = tables[0].columns
        self._store, self._format = source.store, source.format
        records = source.store.table
        by_key = self._format.has_unwritten
        begins = [each.space << SPACE_SHIFT if by_key else records.span(each.space).start for each in tables]
        first = [begin - each.first_row for begin, each in zip(begins, tables, strict=True)]
        self._first = torch.tensor(first, device=records.device)[:, None, None, None]

    def read(self, rows: Tensor) -> Tensor:
        """Values fp32, or as they are stored, ``[L, B, T, c·dim]`` of row ids ``[L, B, T, C]``."""
        shape = *rows.shape[:3], -1
        asked = (rows[..., self._columns] + self._first).flatten()
        if self._format.has_unwritten:
            return DecodedRows(self._format, asked, self._store.fetch(asked)).read.reshape(shape)
        return self._store.values(asked).view(shape)
