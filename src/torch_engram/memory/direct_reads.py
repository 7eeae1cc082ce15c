"""The reads of a memory that is only read, out of tables in the memory of the device that computes: one pass over what
addressing gives (:meth:`~torch_engram.stores.loaded.LoadedStore.read`)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from torch_engram.memory.lookups import Lookups
from torch_engram.memory.plain_reads import PlainReads, Positions
from torch_engram.memory.source import Source
from torch_engram.memory.tables import Table
from torch_engram.stores import LoadedStore

DEVICES = ("cuda",)
"""Kinds of devices that read so. A CPU has no kernel that does it in one pass, and is quicker when it decodes every
distinct row once, though it has to sort for that (dev/LOG.md)."""


def reads_directly(source: Source, device: torch.device) -> bool:
    """Whether rows are values alone, in the memory of ``device``, and it is one that reads so."""
    store = source.store
    values_alone = [plane.name for plane in source.format.layout.planes] == ["value"]
    return device.type in DEVICES and isinstance(store, LoadedStore) and store.table.device == device and values_alone


class DirectReads(PlainReads):
    """Of a source that :func:`reads_directly`. :class:`DirectFetch` reads."""

    def __init__(self, table: Table, source: Source):
        super().__init__(table, source)
        assert isinstance(source.store, LoadedStore), "direct reads want a table that is loaded"
        self.store = source.store

    @property
    def device(self) -> torch.device:
        """See :class:`TouchedRows`."""
        return self.store.table.device


class DirectFetch:
    """What one prefetch reads directly. ``tables``, ``live``: as :class:`Positions` has them. See
    :class:`~torch_engram.memory.prefetching.Fetch`."""

    alone = True

    def __init__(
        self,
        tables: Sequence[DirectReads],
        lookups: Future[Lookups],
        live: Sequence[Tensor | None],
        dtype: torch.dtype,
    ):
        self._tables, self._lookups, self._live, self._dtype = tables, lookups, live, dtype

    def begin(self) -> None:
        """All of it, since nothing has to be brought. See :class:`~torch_engram.memory.prefetching.Fetch`."""
        positions = Positions(self._tables, self._lookups.result(), self._live)
        whole, parts = positions.empty(self._dtype)
        for group, out in zip(positions.groups, parts, strict=True):
            tables = [reads.table for reads in group]
            spaces, first_rows = [table.space for table in tables], [table.first_row for table in tables]
            group[0].store.read(spaces, first_rows, positions.rows[..., tables[0].columns], out)
        self._embeddings = positions.embeddings(whole)
        device = self._tables[0].device
        self._done = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def bring(self) -> None:
        """See :class:`~torch_engram.memory.prefetching.Fetch`."""

    def place(self) -> dict[int, list[Tensor]]:
        """See :class:`~torch_engram.memory.prefetching.Fetch`."""
        if self._done is not None:
            self._done.wait()
        return self._embeddings
