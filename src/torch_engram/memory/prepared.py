"""One layer of a working set: rows and first embeddings made ahead of the step, and brought up to date within it.

Three streams of a GPU meet here. The prefetch stream makes what is made ahead, and an event says when it is there. The
stream *aside* lays newer writes over it, makes further embeddings and merges gradients, while the stream that trains
goes on with other layers. Whoever uses the layer, on whichever stream, comes through :meth:`PreparedLayer.use` first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_engram.memory.rows import TouchedRows


class PreparedLayer:
    """The rows of a layer's tables, and the embeddings ``[B, T, E]`` that read them.

    Made on a thread that prefetches, and its stream; all else happens on the thread that trains. ``ahead``: embeddings
    of the first micro-batches. ``aside``: the stream for patches, further embeddings and merges, None on a CPU.
    ``dtype``: of further embeddings, each made while the micro-batch before it trains; None where all were ``ahead``,
    of rows that are not held, so that none can be made again.
    """

    def __init__(
        self,
        rows: Sequence[TouchedRows],
        ahead: Sequence[Tensor],
        aside: torch.cuda.Stream | None,
        dtype: torch.dtype | None = None,
    ):
        self.rows, self._aside, self._dtype = rows, aside, dtype
        self._done = None if aside is None else torch.cuda.current_stream(aside.device).record_event()
        self._expanded = {micro: (whole, self._done) for micro, whole in enumerate(ahead)}
        self._users: set[torch.cuda.Stream] = set()
        self._is_current = False
        self._merged: torch.cuda.Event | None = None

    def embeddings(self, micro: int) -> Tensor:
        """Those of a micro-batch, up to date, for the current stream to use."""
        self.ready()
        if self._dtype is not None:
            self._expand(micro, self._dtype)
            if self._aside is not None and micro + 1 < len(self.rows[0].shapes):
                self._expand(micro + 1, self._dtype)
        whole, there = self._expanded[micro]
        if there is not None:
            stream = torch.cuda.current_stream(whole.device)
            stream.wait_event(there)
            whole.record_stream(stream)
        return whole

    def _expand(self, micro: int, dtype: torch.dtype) -> None:
        if micro not in self._expanded:
            with torch.cuda.stream(self._aside):
                self.use()
                whole = expanded(self.rows, micro, dtype)
                self._expanded[micro] = whole, None if self._aside is None else self._aside.record_event()

    def let_go(self, micro: int) -> None:
        """Of the embeddings of a micro-batch, if they can be made again for whoever asks again."""
        if self._dtype is not None:
            self._expanded.pop(micro, None)

    def release(self) -> None:
        """Let go of all embeddings."""
        self._expanded.clear()

    def ready(self) -> None:
        """Lay over what was written since the fetch, the first time, and let the current stream wait for it."""
        if not self._is_current:
            with torch.cuda.stream(self._aside):  # it waits for the writes, so they are seen whole
                if self._catch_up() and self._aside is not None:
                    self._done = self._aside.record_event()
            self._expanded = {micro: (whole, self._done) for micro, (whole, _) in self._expanded.items()}
            self._is_current = True  # only now: a patch that failed is tried again, and never passed over
        self.use()

    def _catch_up(self) -> bool:
        """Whether there were newer writes."""
        stale = any(touched.is_stale for touched in self.rows)
        if stale:
            self.use()
            for whole, _ in self._expanded.values():
                if self._aside is not None:
                    whole.record_stream(self._aside)
        parts = [_parts(self.rows, whole) for whole, _ in self._expanded.values()]
        for number, touched in enumerate(self.rows):
            touched.catch_up([of_tables[number] for of_tables in parts])
        return stale

    def use(self) -> None:
        """Let the current stream wait until the layer is there, and keep its memory from being used again before that
        stream is done with it. Each stream does so once: what is aside waits for the prefetch, all others for both."""
        if self._done is None:
            return
        stream = torch.cuda.current_stream(self.rows[0].device)
        if stream not in self._users:
            self._users.add(stream)
            stream.wait_event(self._done)
            for touched in self.rows:
                touched.used_on(stream)

    def merge(self, micro: int, grad: Tensor) -> None:
        """Add a gradient ``[B, T, E]`` of a micro-batch's embeddings to the rows' own, aside."""
        if self._aside is not None:  # the gradient is there when the current stream is, and read until aside is
            self._aside.wait_stream(torch.cuda.current_stream(self._aside.device))
            grad.record_stream(self._aside)
        with torch.cuda.stream(self._aside):
            self.use()
            for touched, part in zip(self.rows, _parts(self.rows, grad), strict=True):
                touched.merge(micro, part)
        if self._aside is not None:
            self._merged = self._aside.record_event()

    def join(self) -> None:
        """Let the current stream wait for the merges; from here on the gradients are used there."""
        if self._merged is not None:
            stream = torch.cuda.current_stream(self.rows[0].device)
            stream.wait_event(self._merged)
            for touched in self.rows:
                if touched.grad is not None:
                    touched.grad.record_stream(stream)


def expanded(rows: Sequence[TouchedRows], micro: int, dtype: torch.dtype) -> Tensor:
    """The embeddings ``[B, T, E]`` of a micro-batch, of fetched rows of all tables of a layer."""
    width = sum(touched.width for touched in rows)
    whole = torch.empty((*rows[0].shapes[micro], width), dtype=dtype, device=rows[0].device)
    for touched, part in zip(rows, _parts(rows, whole), strict=True):
        touched.expand(micro, part)
    return whole


def _parts(rows: Sequence[TouchedRows], whole: Tensor) -> Sequence[Tensor]:
    """Every table's columns of ``[B, T, E]``."""
    parts: Sequence[Tensor] = whole.split([touched.width for touched in rows], dim=-1)
    return parts
