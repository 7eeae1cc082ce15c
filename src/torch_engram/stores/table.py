"""What the device and the host store share: a flat array of records, rows of all spaces one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from torch_engram.kernels import use_kernels
from torch_engram.stores.codecs import CODECS
from torch_engram.stores.gather import gather_rows
from torch_engram.stores.host_memory import HostMemory
from torch_engram.stores.records import RecordLayout
from torch_engram.stores.recycled import recycled
from torch_engram.stores.row_index import IndexedStore, RowIndex, zeros


class RecordTable(RowIndex):
    """Records of every row of ``spaces`` (space → rows), zeroed, in one allocation on ``device``.

    A CPU's is mapped at first touch, so a table of any size costs nothing until it is used. ``memory``: host memory
    that the records are in instead, as they are; ``marks``: such memory of a zero byte a row, where GPUs that write
    mark what they wrote.
    """

    def __init__(
        self,
        layout: RecordLayout,
        spaces: Mapping[int, int],
        device: torch.device,
        memory: HostMemory | None = None,
        marks: HostMemory | None = None,
    ):
        super().__init__(layout, spaces, device)
        shape = (sum(spaces.values()), layout.nbytes)
        self.memory, self.marks = memory, marks
        self.records = zeros(shape, device) if memory is None else torch.from_numpy(memory.bytes).view(shape)
        self.words = self.records.view(torch.int64)
        """The same, for rows move as 8-byte words: int64 ``[rows, nbytes / 8]``."""
        if marks is not None:
            self._changed = torch.from_numpy(marks.bytes)

    def reach(self, device: torch.device) -> tuple[Tensor, Tensor | None] | None:
        """Of a table on the host, :attr:`words` and the marks uint8 ``[rows]``, if it has any, as kernels of a GPU
        reach them; None where nothing was done for that. Raises what
        :meth:`HostMemory.reach <torch_engram.stores.host_memory.HostMemory.reach>` does."""
        if self.memory is None:
            return None
        words = torch.from_numpy(self.memory.reach(device)).view(torch.int64).view(self.words.shape)
        return words, None if self.marks is None else torch.from_numpy(self.marks.reach(device))

    def gather(self, keys: Tensor) -> Tensor:
        """Records uint8 ``[U, nbytes]`` of keys ``[U]``, both on the table's device. On a CPU, raises ``ValueError``
        naming a row or a space that is not there."""
        if use_kernels(keys):
            from torch_engram.stores.table_kernels import gather_triton

            return gather_triton(self.words, self.bases, keys).view(torch.uint8)
        if keys.is_cuda:
            return self.words.index_select(0, self.index(keys)).view(torch.uint8)
        index = self.checked_index(keys)
        return gather_rows(self.records, index, recycled(len(keys), self.layout.nbytes))

    def values(self, index: Tensor) -> Tensor:
        """Of rows by their number ``[n]``, none of which waits for its initial value: fp32 ``[n, dim]``."""
        parts = tuple(part.index_select(0, index) for part in self._values)
        return CODECS[self.layout.plane("value").codec].decode(parts)

    @cached_property
    def _values(self) -> tuple[Tensor, ...]:
        """The values of all records, one view a component of their codec."""
        return tuple(self.layout.view(self.records, field) for field in self.layout.fields if field.plane == "value")

    def scatter(self, keys: Tensor, records: Tensor) -> None:
        """Replace the records of distinct keys."""
        if use_kernels(keys):
            from torch_engram.stores.table_kernels import scatter_triton

            scatter_triton(self.words, self.bases, keys, records.view(torch.int64), self._changed)
            return
        index = self.index(keys)
        self._changed.index_fill_(0, index, 1)
        self.words.index_copy_(0, index, records.view(torch.int64))


class TableStore(IndexedStore):
    """A writable store of the records of one table."""

    def __init__(self, table: RecordTable):
        super().__init__(table)
        self.table = table
