"""What the device and the host store share: a flat array of records, rows of all spaces one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from torch_engram.kernels import use_kernels
from torch_engram.stores.gather import gather_rows
from torch_engram.stores.host_memory import HostMemory
from torch_engram.stores.records import ROW_MASK, SPACE_SHIFT, RecordLayout
from torch_engram.stores.recycled import recycled


class RecordTable:
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
        self.layout, self.spaces, self.device = layout, dict(spaces), device
        shape = (sum(spaces.values()), layout.nbytes)
        self.memory, self.marks = memory, marks
        self.records = _zeros(shape, device) if memory is None else torch.from_numpy(memory.bytes).view(shape)
        self.words = self.records.view(torch.int64)
        """The same, for rows move as 8-byte words: int64 ``[rows, nbytes / 8]``."""
        bases = torch.zeros(max(spaces) + 1, dtype=torch.int64)
        for space, base in zip(spaces, accumulate(spaces.values(), initial=0), strict=False):
            bases[space] = base
        self.bases = bases.to(device)
        """Where the rows of every space begin, int64 by its number."""
        self._changed = _zeros(shape[:1], device) if marks is None else torch.from_numpy(marks.bytes)
        self.counts_from = 0

    def reach(self, device: torch.device) -> tuple[Tensor, Tensor | None] | None:
        """Of a table on the host, :attr:`words` and the marks uint8 ``[rows]``, if it has any, as kernels of a GPU
        reach them; None where nothing was done for that. Raises what
        :meth:`HostMemory.reach <torch_engram.stores.host_memory.HostMemory.reach>` does."""
        if self.memory is None:
            return None
        words = torch.from_numpy(self.memory.reach(device)).view(torch.int64).view(self.words.shape)
        return words, None if self.marks is None else torch.from_numpy(self.marks.reach(device))

    def index(self, keys: Tensor) -> Tensor:
        """Position of every key in the array, int64."""
        return self.bases[keys >> SPACE_SHIFT] + (keys & ROW_MASK)

    def span(self, space: int) -> slice:
        """Where the rows of one space lie in the array."""
        start = int(self.bases[space])
        return slice(start, start + self.spaces[space])

    def checked_index(self, keys: Tensor) -> Tensor:
        """:meth:`index` of keys on the CPU. Raises ``ValueError`` naming a row or a space that is not there."""
        if not len(keys):
            return keys
        asked = keys.numpy()  # torch's threads would wait for each other, which takes longer than the work
        lowest, highest = int(asked.min()), int(asked.max())
        space = lowest >> SPACE_SHIFT
        if highest >> SPACE_SHIFT == space:  # the keys of one space differ from its rows by a constant
            self._require(space, highest & ROW_MASK)
            return torch.from_numpy(asked + (self.span(space).start - (space << SPACE_SHIFT)))
        spaces, rows = asked >> SPACE_SHIFT, asked & ROW_MASK
        for space in np.unique(spaces).tolist():
            self._require(space, int(rows[spaces == space].max()))
        return self.index(keys)

    def _require(self, space: int, row: int) -> None:
        if space not in self.spaces:
            raise ValueError(f"There is no table with number {space} here: ask for {', '.join(map(str, self.spaces))}.")
        if row >= self.spaces[space]:
            raise ValueError(
                f"Row {row:,} is not in table {space}, which has {self.spaces[space]:,} rows: check that the "
                "configuration is the table's."
            )

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

    def scatter(self, keys: Tensor, records: Tensor) -> None:
        """Replace the records of distinct keys."""
        if use_kernels(keys):
            from torch_engram.stores.table_kernels import scatter_triton

            scatter_triton(self.words, self.bases, keys, records.view(torch.int64), self._changed)
            return
        index = self.index(keys)
        self._changed.index_fill_(0, index, 1)
        self.words.index_copy_(0, index, records.view(torch.int64))

    def changed(self, space: int) -> Tensor:
        """Rows of one space, ascending, whose records were replaced since :meth:`forget_changes`."""
        return self._changed[self.span(space)].nonzero().squeeze(1).cpu()

    def forget_changes(self) -> int:
        """Count changes from here on; returns the new :attr:`counts_from`."""
        self.counts_from += 1
        if self.marks is None:  # a CPU's new zeros have no pages yet
            self._changed = _zeros(self._changed.shape, self.device)
        else:  # GPUs go on to mark there
            self._changed.zero_()
        return self.counts_from


class TableStore:
    """The part of a writable store that follows from its table."""

    grouped = False

    def __init__(self, table: RecordTable):
        self.table, self.layout, self.spaces = table, table.layout, table.spaces

    @property
    def counts_from(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.table.counts_from

    def changed(self, space: int) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.table.changed(space)

    def forget_changes(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self.table.forget_changes()


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Zeroed bytes."""
    if device.type == "cpu" and all(shape):  # torch.zeros would touch every page, but NumPy's strides of nothing are 0
        return torch.from_numpy(np.zeros(shape, np.uint8))
    return torch.zeros(shape, dtype=torch.uint8, device=device)
