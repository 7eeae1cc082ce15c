"""The reads of a memory that is only read: what addressing gives goes in, embeddings come out, and no row is sorted out
or held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from torch_engram.memory.lookups import Lookups
from torch_engram.memory.rows import TouchedRows
from torch_engram.memory.segments import unique_rows


class PlainReads(TouchedRows):
    """As :class:`TouchedRows`, for reading only: what it needs no rows for."""

    def keep(self, rows: Callable[[], Tensor], live: Tensor | None) -> None:
        """What gives the rows that are read, int64 ``[n, c]``, where they are live, bool ``[n]``."""
        self._rows, self._live = rows, live

    @property
    def distinct(self) -> int:
        """See :class:`TouchedRows`."""
        rows = self._rows() if self._live is None else self._rows()[self._live]
        return len(unique_rows(rows.flatten())[0])

    def catch_up(self, expanded: Sequence[Tensor]) -> None:
        """Nothing: a memory that is only read has no writes."""
        self.release()

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """See :meth:`TouchedRows.used_on`."""
        if self._live is not None:
            self._live.record_stream(stream)


Reads = TypeVar("Reads", bound=PlainReads)


class Positions(Generic[Reads]):
    """What one prefetch reads: the positions of all its micro-batches, one after the other, for all layers together,
    since their tables are alike.

    ``tables``: of some layers, each layer's one after the other; they :meth:`~PlainReads.keep` what is read of them.
    ``live``: the micro-batches' masks. The current stream waits until ``lookups`` are found.
    """

    def __init__(self, tables: Sequence[Reads], lookups: Lookups, live: Sequence[Tensor | None]):
        lookups.wait()
        self._layers, self._device = list(dict.fromkeys(reads.table.layer for reads in tables)), tables[0].device
        per_layer = len(tables) // len(self._layers)
        self.groups = [tables[first::per_layer] for first in range(per_layer)]
        """Tables of all layers that have the same columns."""
        self._found = [lookup.of(self._layers) for lookup in lookups.batches]  # kept until it has been read
        self._shapes = [(rows.shape[1], rows.shape[2]) for _, rows in self._found]
        self.mixes, self.rows = (_joined(parts) for parts in zip(*self._found, strict=True))
        """int64 ``[L, n, N-1]`` and ``[L, n, C]``."""
        self._live = None if all(mask is None for mask in live) else self._mask(live)
        for group in self.groups:
            for reads, of_layer in zip(group, self.rows[..., group[0].table.columns], strict=True):
                reads.keep(partial(_same, of_layer), self._live)

    def empty(self, dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
        """Room for the embeddings ``[L, n, E]``, and every group's part of it ``[L, n, C·dim]``."""
        widths = [group[0].width for group in self.groups]
        whole = torch.empty(*self.rows.shape[:2], sum(widths), dtype=dtype, device=self._device)
        return whole, whole.split(widths, -1)

    def embeddings(self, whole: Tensor) -> dict[int, list[Tensor]]:
        """For every layer the embeddings ``[B, T, E]`` of every micro-batch, in what :meth:`empty` gave; those of
        positions that are not live become zero."""
        if self._live is not None:
            whole.masked_fill_(~self._live[:, None], 0)
        return by_layer(self._layers, whole, self._shapes)

    def _mask(self, live: Sequence[Tensor | None]) -> Tensor:
        masks = zip(live, self._shapes, strict=True)
        return torch.cat([
            (torch.ones(shape, dtype=torch.bool) if mask is None else mask).flatten().to(self._device)
            for mask, shape in masks
        ])  # fmt: skip


def by_layer(layers: Sequence[int], whole: Tensor, shapes: Sequence[tuple[int, int]]) -> dict[int, list[Tensor]]:
    """Embeddings ``[L, n, E]`` of positions of all micro-batches as every layer's ``[B, T, E]`` of each."""
    positions = [batch * length for batch, length in shapes]
    return {
        layer: [part.view(*shape, whole.shape[-1]) for part, shape in zip(own.split(positions), shapes, strict=True)]
        for layer, own in zip(layers, whole, strict=True)
    }


def _same(rows: Tensor) -> Tensor:
    return rows


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Positions of all micro-batches one after the other: ``[L, n, ...]``."""
    flat = [part.flatten(1, 2) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)
