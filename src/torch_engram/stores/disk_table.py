"""A table that is trained on disk: rows and their optimiser state in one file, read a step ahead, written back behind.

For tables that no memory holds. Rows cross the disk once per use in each direction, in blocks of 4 KiB, and blocks that
were used lately stay in memory (:mod:`torch_engram.stores.block_cache`). The file lives as long as the store: what
outlasts a run are its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torch_engram.forks import OneProcess
from torch_engram.stores.block_table import BlockTable
from torch_engram.stores.ordered_writes import OrderedWrites, staged
from torch_engram.stores.pinned import pinned
from torch_engram.stores.records import RecordLayout
from torch_engram.stores.recycled import recycled
from torch_engram.stores.row_index import IndexedStore

_STAGED = 64 << 20
"""Bytes of one copy to a GPU."""


class DiskTable(IndexedStore):
    """A writable store in a file of ``folder``, which is made anew, serves keys from, and records to, any device, and
    is removed when nobody holds the store any more.

    Any thread may fetch while another one writes. ``staging``: bytes of memory for blocks that were used lately, by
    default an eighth of what is free; rows of two steps that are in it are read once. The file is sparse: it takes room
    on the disk as rows are written. Raises ``ValueError`` when another process or bank trains in the folder, and
    ``OSError`` when the file cannot be made there.
    """

    def __init__(self, layout: RecordLayout, spaces: Mapping[int, int], folder: Path, staging: int | None = None):
        self._table = BlockTable(layout, spaces, folder / f"rows-{min(spaces):02d}.safetensors", staging)
        super().__init__(self._table)
        self._writes = OrderedWrites(partial(staged, self._table.scatter), str(self._table.file.path))
        self._process = OneProcess("A table that is trained on disk")

    @property
    def acknowledged(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self._writes.acknowledged

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.Store`. A row that a pending write is changing may come back
        torn; its write is not acknowledged, so the reader patches it. Raises ``ValueError`` naming a row that is not
        there, ``OSError`` naming the file that cannot be read, or not be written to make room."""
        self._process.require()
        if keys.device.type == "cpu":
            records = recycled(len(keys), self.layout.nbytes)
            self._table.gather(keys, records)
            return records
        on_host = keys.cpu()
        records = torch.empty((len(keys), self.layout.nbytes), dtype=torch.uint8, device=keys.device)
        most = max(1, _STAGED // self.layout.nbytes)
        for part, target in zip(on_host.split(most), records.split(most), strict=True):
            staged = pinned((len(part), self.layout.nbytes), torch.uint8, keys.device)
            self._table.gather(part, staged)
            target.copy_(staged, non_blocking=True)
        return records

    def write(self, keys: Tensor, records: Tensor) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`. Raises ``OSError`` naming the file when an earlier
        write could not be carried out, as when the disk is full."""
        self._process.require()
        self._table.cache.require_sound()
        return self._writes.write(keys, records)

    def flush(self) -> None:
        """See :class:`~torch_engram.stores.protocol.WritableStore`. All changed blocks are in the file then, for a full
        disk to be found out before a checkpoint; raises as :meth:`write` does, every time."""
        self._process.require()
        self._table.cache.require_sound()
        self._writes.flush()
        self._table.cache.drain()
