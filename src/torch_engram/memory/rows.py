"""The rows of one table that one step touches: fetched once, expanded for every micro-batch, merged, written back.

The fetch and the first expansion run ahead of the step, in which only rows that were written since are done again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from torch_engram.kernels import use_kernels
from torch_engram.memory.segments import Segments, expand, merge, unique_rows
from torch_engram.memory.source import Source
from torch_engram.memory.tables import Table
from torch_engram.stores import DecodedRows, make_keys
from torch_engram.stores.records import ROW_MASK, SPACE_SHIFT


class TouchedRows:
    """U rows of one table for one step: decoded planes, then gradients. All tensors on one device."""

    def __init__(self, table: Table, source: Source):
        self.table, self.source = table, source
        self.epoch = source.begin_read()
        """The fetch sees this write at least; after :meth:`catch_up`, the planes are as of exactly this one."""
        self.waits_for = 0
        """The write that the fetch waits to see, where others are trained first: one less to be laid over then."""
        self.planes: DecodedRows | None = None
        self.grad: Tensor | None = None
        self._released, self._reads_from = False, deque([self.epoch])
        """``_reads_from``: epochs of reads to be ended, each by whoever takes it out."""

    @property
    def width(self) -> int:
        """Numbers that one position reads from this table."""
        return len(self.table.orders) * self.table.dim

    @property
    def device(self) -> torch.device:
        """Where the rows are, once they are fetched."""
        return self.keys.device

    @property
    def distinct(self) -> int:
        """U, once they are fetched."""
        return len(self.keys)

    # -- before the step, perhaps on another thread and stream --------------------------------------------------

    def fetch(self, lookups: Sequence[tuple[Tensor, Tensor]], live: Sequence[Tensor | None]) -> None:
        """Find the distinct rows of every micro-batch's (mixes ``[B, T, N-1]``, rows ``[B, T, C]``), read and decode
        them.

        ``live[i]``: bool ``[B, T]``; positions that are not live touch no row.
        """
        self._see_writes()
        self.kept = [None if mask is None else mask.reshape(-1).nonzero().squeeze(1) for mask in live]
        self.shapes = [rows.shape[:2] for _, rows in lookups]
        reads = self._reads([rows[..., self.table.columns] for _, rows in lookups])
        ids, first_read, all_reads = unique_rows(torch.cat(reads) - self.table.first_row, self.table.rows)
        if len(reads) == 1:
            self.segments = [all_reads]
        else:
            pieces = all_reads.inverse.split([len(part) for part in reads])
            self.segments = [Segments.of(piece, len(ids)) for piece in pieces]
        group = None
        if self.source.store.grouped:
            group = torch.cat(self._reads([mix[..., list(self.table.orders)] for mix, _ in lookups]))[first_read]
        self._bring(ids, group)

    def give_up(self) -> None:
        """In place of :meth:`fetch`, or after it failed: nobody else waits for these rows."""

    def _see_writes(self) -> None:
        if self.waits_for > self.epoch:
            self.source.wait(self.waits_for)
            self.epoch = self.source.begin_read()
            self._reads_from.append(self.epoch)
            if self._released:  # meanwhile, by another thread or a garbage collector
                self.release()
            else:
                with suppress(IndexError):
                    self.source.end_read(self._reads_from.popleft())

    def _bring(self, ids: Tensor, group: Tensor | None) -> None:
        self.keys = make_keys(self.table.space, ids)
        self.planes = DecodedRows(self.source.format, self.keys, self.source.store.fetch(self.keys, group))

    @property
    def values(self) -> Tensor:
        """``[U, dim]``: what positions read."""
        assert self.planes is not None, "fetch comes before the rows are read"
        return self.planes.read

    def _reads(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """``[B, T, c]`` of every micro-batch flattened to one entry a read, dead positions left out."""
        flat = [part.reshape(-1, part.shape[-1]) for part in columns]
        live = [part if kept is None else part[kept] for part, kept in zip(flat, self.kept, strict=True)]
        return [part.reshape(-1) for part in live]

    def expand(self, micro: int, out: Tensor) -> None:
        """Write the rows of micro-batch ``micro`` to their positions in ``out`` ``[B, T, c·dim]``, and zero to dead
        positions."""
        inverse, kept, dim = self.segments[micro].inverse, self.kept[micro], self.table.dim
        if kept is None and out.is_contiguous():
            expand(self.values, inverse, out.view(-1, dim))
            return
        rows = expand(self.values, inverse, out.new_empty(len(inverse), dim)).view(-1, self.width)
        positions = out.view(-1, self.width)
        if kept is None:
            positions.copy_(rows)
        else:
            positions.zero_().index_copy_(0, kept, rows)

    # -- in the step --------------------------------------------------------------------------------------------

    @property
    def is_stale(self) -> bool:
        """Whether there were writes that the fetch may have missed."""
        return self.source.newer_than(self.epoch, self.table.space)

    def catch_up(self, expanded: Sequence[Tensor]) -> None:
        """Lay missed writes over the rows, which are then those of the newest epoch, and over what :meth:`expand` gave
        for the first micro-batches, where it reads a row that changed."""
        assert self.planes is not None, "fetch comes before catch_up"
        if self.is_stale:
            changed = self.source.lay_over(self.planes, self.epoch, self.table.space)
            for micro, out in enumerate(expanded):
                self._expand_changed(micro, changed, out)
        self.release()
        self.epoch = self.source.newest

    def _expand_changed(self, micro: int, changed: Tensor, out: Tensor) -> None:
        assert self.planes is not None
        if use_kernels(out):
            from torch_engram.memory.patch_kernels import expand_changed_triton

            inverse, kept = self.segments[micro].inverse, self.kept[micro]
            expand_changed_triton(self.values, inverse, kept, changed, out.view(-1, self.width))
        elif changed.any():  # a CPU takes longer to find the places than to fill them all
            self.expand(micro, out)

    def release(self) -> None:
        """Fetched rows are up to date or given up: no later write needs to be kept for them."""
        self._released = True
        with suppress(IndexError):  # of an empty one
            while True:
                self.source.end_read(self._reads_from.popleft())

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of all that is here from being used again before ``stream`` is done with it."""
        assert self.planes is not None, "fetch comes before used_on"
        self.planes.used_on(stream)
        tensors = list(self.kept)
        for segments in self.segments:
            tensors += [segments.inverse, segments.order, segments.starts]
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(stream)

    def merge(self, micro: int, grad: Tensor) -> None:
        """Add the gradient ``[B, T, c·dim]`` of a micro-batch's embeddings to the rows' fp32 gradient."""
        flat = grad.reshape(-1, grad.shape[-1])
        kept = self.kept[micro]
        reads = (flat if kept is None else flat[kept]).reshape(-1, self.table.dim)
        self.grad = merge(reads, self.segments[micro], self.grad, adds=self.grad is not None)

    def reduce(self) -> None:
        """Bring the gradients of all who read the rows together: a rank alone has them all."""

    def absorb(self, other: TouchedRows) -> None:
        """Take over the rows of another fetch of this table, and their gradients; both are of the newest epoch."""
        assert self.planes is not None and other.planes is not None, "fetch comes before absorb"
        both = torch.cat((self.keys, other.keys))
        keys, place = both.unique(return_inverse=True)
        read_at = torch.empty_like(keys).scatter_(0, place, torch.arange(len(both), device=both.device))
        grads = torch.zeros(len(keys), self.table.dim, device=self.device)
        for part, own in zip(place.split((len(self.keys), len(other.keys))), (self, other), strict=True):
            grads.index_add_(0, part, own.total_grad())  # each row once, so in no order
        records = torch.cat((self.planes.encode(), other.planes.encode()))
        self.planes = DecodedRows(self.source.format, keys, records[read_at])
        self.keys, self.grad = keys, grads

    def holds(self, keys: Tensor) -> Tensor:
        """Which keys int64 ``[n]`` are of this table, bool ``[n]``."""
        return keys >> SPACE_SHIFT == self.table.space

    def take_in(self, keys: Tensor) -> None:
        """Have the rows of keys int64 ``[n]`` of this table, too, which others read: as of the newest epoch, with no
        gradient."""
        assert not self.source.store.grouped, "rows that are trained are kept one by one"
        missing = keys[~torch.isin(keys, self.keys)]
        if not len(missing):
            return
        others = TouchedRows(self.table, self.source)
        try:
            others._bring(missing & ROW_MASK, None)
            others.catch_up(())
        finally:
            others.release()
        self.absorb(others)

    def total_grad(self) -> Tensor:
        """The gradient fp32 ``[U, dim]``, zero for rows that were read but got none."""
        if self.grad is None:
            self.grad = torch.zeros(len(self.keys), self.table.dim, device=self.keys.device)
        return self.grad

    def write(self) -> None:
        """Send the rows as they stand back to the store."""
        assert self.planes is not None, "fetch comes before write"
        self.source.write(self.planes, self.table.space)
