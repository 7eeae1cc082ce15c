"""The rows of one table that one step touches, where the table is divided over ranks.

A rank reads rows and holds others. Ahead of the step it says which ones it reads, and those that it holds are fetched
for whoever asked. In the step they are brought up to date where they are held, and only then sent: so each crosses
once, and is exact. Gradients of what a rank read go back the same way and are added up in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_engram.memory.exchange import Exchange
from torch_engram.memory.rows import TouchedRows
from torch_engram.memory.segments import merge, unique_rows
from torch_engram.memory.source import Source
from torch_engram.memory.tables import Table
from torch_engram.stores import DecodedRows, make_keys


class ShardedRows(TouchedRows):
    """As :class:`TouchedRows`: ``keys``, ``planes`` and, once it is reduced, ``grad`` are those of the rows that this
    rank holds, whoever reads them; what it reads is expanded."""

    def __init__(self, table: Table, source: Source, exchange: Exchange):
        super().__init__(table, source)
        self._exchange = exchange
        self._read: Tensor | None = None
        self._has_come = self._has_asked = False

    def give_up(self) -> None:
        """See :class:`TouchedRows`: the other ranks are told, as far as they wait for it."""
        if not self._has_asked:
            self._exchange.give_up()

    def _bring(self, ids: Tensor, group: Tensor | None) -> None:
        shard = self._exchange.shard
        self._has_asked = True
        self._route = self._exchange.route(ids)
        self._reads_here = len(ids)
        own, _, self._asked = unique_rows(self._route.asked, shard.count(self.table.rows))
        self.keys = make_keys(self.table.space, shard.row(own))
        self.planes = DecodedRows(self.source.format, self.keys, self.source.store.fetch(self.keys))

    @property
    def values(self) -> Tensor:
        """See :class:`TouchedRows`."""
        assert self._read is not None, "catch_up comes before the rows are read"
        return self._read

    @property
    def is_stale(self) -> bool:
        """See :class:`TouchedRows`; rows that have not come are."""
        return not self._has_come or super().is_stale

    def catch_up(self, expanded: Sequence[Tensor]) -> None:
        """See :class:`TouchedRows`. Collective."""
        super().catch_up(())
        if not self._has_come:
            assert self.planes is not None
            stored = self.planes.read.to(_WIRE[self.source.format.layout.plane("value").codec])
            self._read = self._route.answer(stored[self._asked.inverse])
            self._has_come = True

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """See :class:`TouchedRows`."""
        super().used_on(stream)
        for tensor in (self._route.order, self._asked.inverse, self._asked.order, self._asked.starts):
            tensor.record_stream(stream)

    def reduce(self) -> None:
        """Gradients to where the rows are held, averaged over the ranks as those of a dense network are. Collective."""
        read = torch.zeros(self._reads_here, self.table.dim, device=self.device) if self.grad is None else self.grad
        self.grad = merge(self._route.give(read), self._asked).div_(self._exchange.shard.ranks)


_WIRE = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Values cross as they are stored: rounding them to that type changes none."""
