"""Where rows are among the rows of all spaces, one space after the other, and which of them were written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from torch_engram.stores.records import ROW_MASK, SPACE_SHIFT, RecordLayout

_EARLIER = 2
"""Marks a row that was written before changes were last forgotten; 1 marks one that was written since."""
_PIECE = 1 << 20
"""Marks that are looked at together: what a look at them takes is bounded by it."""


class RowIndex:
    """Numbers the rows of ``spaces`` (space → rows) for keys on ``device``."""

    def __init__(self, layout: RecordLayout, spaces: Mapping[int, int], device: torch.device):
        self.layout, self.spaces, self.device = layout, dict(spaces), device
        bases = torch.zeros(max(spaces) + 1, dtype=torch.int64)
        for space, base in zip(spaces, accumulate(spaces.values(), initial=0), strict=False):
            bases[space] = base
        self.bases = bases.to(device)
        """Where the rows of every space begin, int64 by its number."""
        self._changed = zeros((sum(spaces.values()),), device)
        self.counts_from = 0

    def index(self, keys: Tensor) -> Tensor:
        """The number of every key's row, int64."""
        return self.bases[keys >> SPACE_SHIFT] + (keys & ROW_MASK)

    def span(self, space: int) -> slice:
        """The numbers of one space's rows."""
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

    def changed(self, space: int) -> Tensor:
        """Rows of one space, ascending, whose records were replaced since :meth:`forget_changes`."""
        return self._marked(space, lambda marks: marks == 1)

    def written(self, space: int) -> Tensor:
        """Rows of one space, ascending, whose records were ever replaced."""
        return self._marked(space, lambda marks: marks)

    def _marked(self, space: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        pieces = self._changed[self.span(space)].split(_PIECE)
        found = [choose(piece).nonzero().squeeze(1).add_(number * _PIECE) for number, piece in enumerate(pieces)]
        return torch.cat(found).cpu()

    def forget_changes(self) -> int:
        """Count changes from here on; returns the new :attr:`counts_from`."""
        self.counts_from += 1
        for piece in self._changed.split(_PIECE):  # in place: a GPU goes on to mark there
            piece.index_fill_(0, piece.nonzero().squeeze(1), _EARLIER)
        return self.counts_from


class IndexedStore:
    """The part of a writable store that follows from its rows' numbers."""

    grouped = False

    def __init__(self, rows: RowIndex):
        self._rows, self.layout, self.spaces = rows, rows.layout, rows.spaces

    @property
    def counts_from(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self._rows.counts_from

    def wait(self, epoch: int) -> None:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""

    def changed(self, space: int) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self._rows.changed(space)

    def written(self, space: int) -> Tensor:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self._rows.written(space)

    def forget_changes(self) -> int:
        """See :class:`~torch_engram.stores.protocol.WritableStore`."""
        return self._rows.forget_changes()


def zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Zeroed bytes; a CPU's are mapped at first touch."""
    if device.type == "cpu" and all(shape):  # torch.zeros would touch every page, but NumPy's strides of nothing are 0
        return torch.from_numpy(np.zeros(shape, np.uint8))
    return torch.zeros(shape, dtype=torch.uint8, device=device)
