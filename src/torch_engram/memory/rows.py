"""The rows of one table that one step touches: fetched once, expanded for every micro-batch, merged, written back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_engram.memory.segments import Segments, expand, merge, unique_rows
from torch_engram.memory.source import Source
from torch_engram.stores import make_keys


@dataclass(frozen=True)
class Table:
    """One row space of a memory: a layer's columns that share a row width."""

    layer: int
    space: int
    columns: slice
    first_row: int
    """Row id, in the layer's numbering, of this table's row 0."""
    rows: int
    dim: int
    orders: tuple[int, ...]
    """For each of the table's columns, the index of its order among the mixes."""


class TouchedRows:
    """U rows of one table for one step: records, then planes, then gradients. All tensors on one device."""

    def __init__(self, table: Table, source: Source):
        self.table, self.source = table, source
        self.epoch = source.begin_read()  # the fetch sees at least this one; after `decode`, the planes hold exactly it
        self.planes: dict[str, Tensor] | None = None
        self.grad: Tensor | None = None
        self._records: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        self._released = False

    @property
    def width(self) -> int:
        """Numbers that one position reads from this table."""
        return len(self.table.orders) * self.table.dim

    # -- before the step, perhaps on another thread and stream --------------------------------------------------

    def fetch(self, lookups: Sequence[tuple[Tensor, Tensor]], live: Sequence[Tensor | None]) -> None:
        """Find the distinct rows of every micro-batch's (mixes ``[B, T, N-1]``, rows ``[B, T, C]``) and read them.

        ``live[i]``: bool ``[B, T]``; positions that are not live touch no row.
        """
        self.live = [None if mask is None else mask.reshape(-1) for mask in live]
        self.shapes = [rows.shape[:2] for _, rows in lookups]
        reads = self._reads([rows[..., self.table.columns] for _, rows in lookups])
        ids, first_read, all_reads = unique_rows(torch.cat(reads) - self.table.first_row)
        self.keys = make_keys(self.table.space, ids)
        if len(reads) == 1:
            self.segments = [all_reads]
        else:
            pieces = all_reads.inverse.split([len(part) for part in reads])
            self.segments = [Segments.of(piece, len(ids)) for piece in pieces]
        group = None
        if self.source.store.grouped:
            group = torch.cat(self._reads([mix[..., list(self.table.orders)] for mix, _ in lookups]))[first_read]
        self._records = self.source.store.fetch(self.keys, group)
        if self.keys.device.type == "cuda":
            self._ready = torch.cuda.current_stream(self.keys.device).record_event()

    def _reads(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """``[B, T, c]`` of every micro-batch flattened to one entry a read, dead positions left out."""
        flat = [part.reshape(-1, part.shape[-1]) for part in columns]
        kept = [part if live is None else part[live] for part, live in zip(flat, self.live, strict=True)]
        return [part.reshape(-1) for part in kept]

    # -- in the step --------------------------------------------------------------------------------------------

    def decode(self) -> None:
        """Lay missed writes over the records and decode the planes: the rows are then those of the newest epoch."""
        assert self._records is not None, "fetch comes before decode"
        if self._ready is not None:
            stream = torch.cuda.current_stream(self.keys.device)
            stream.wait_event(self._ready)
            self.used_on(stream)
        self.planes = self.source.decode(self.keys, self._records, self.epoch)
        self.release()
        self.epoch = self.source.newest

    def release(self) -> None:
        """Give up the fetched records: no later write needs to be kept for them."""
        if not self._released:
            self._released, self._records = True, None
            self.source.end_read(self.epoch)

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of all that is here from being used again before ``stream`` is done with it."""
        tensors = [self.keys, self._records, *self.live, *(self.planes or {}).values()]
        for segments in self.segments:
            tensors += [segments.inverse, segments.order, segments.starts]
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(stream)

    def expand(self, micro: int, out: Tensor) -> None:
        """Write the rows of micro-batch ``micro`` to their positions in ``out`` ``[B, T, c·dim]``, and zero to dead
        positions."""
        assert self.planes is not None, "decode comes before expand"
        inverse, live, dim = self.segments[micro].inverse, self.live[micro], self.table.dim
        if live is None and out.is_contiguous():
            expand(self.planes["value"], inverse, out.view(-1, dim))
            return
        rows = expand(self.planes["value"], inverse, out.new_empty(len(inverse), dim)).view(-1, self.width)
        positions = out.view(-1, self.width)
        if live is None:
            positions.copy_(rows)
        else:
            positions.zero_().index_put_((live,), rows)

    def merge(self, micro: int, grad: Tensor) -> None:
        """Add the gradient ``[B, T, c·dim]`` of a micro-batch's embeddings to the rows' fp32 gradient."""
        assert self.planes is not None, "decode comes before merge"
        flat = grad.reshape(-1, grad.shape[-1])
        live = self.live[micro]
        reads = (flat if live is None else flat[live]).reshape(-1, self.table.dim)
        merged = merge(reads, self.segments[micro])
        self.grad = merged if self.grad is None else self.grad.add_(merged)

    def total_grad(self) -> Tensor:
        """The gradient fp32 ``[U, dim]``, zero for rows that were read but got none."""
        assert self.planes is not None, "decode comes before total_grad"
        if self.grad is None:
            self.grad = torch.zeros_like(self.planes["value"])
        return self.grad

    def write(self) -> None:
        """Send the planes as they stand back to the store."""
        assert self.planes is not None, "decode comes before write"
        self.source.write(self.keys, self.planes)
