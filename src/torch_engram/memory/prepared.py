"""One layer of a working set: rows and embeddings made ahead of the step, and brought up to date within it.

Three streams of a GPU meet here. The prefetch stream makes everything, and an event says when it is there. The stream
*aside* lays newer writes over it and merges gradients, while the stream that trains goes on with other layers. Whoever
uses the layer, on whichever stream, comes through :meth:`PreparedLayer.use` first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_engram.memory.rows import TouchedRows


class PreparedLayer:
    """The rows of a layer's tables, and for every micro-batch the embeddings ``[B, T, E]`` that read them.

    Made on a thread that prefetches, and its stream; all else happens on the thread that trains. ``aside``: the stream
    for patches and merges, None on a CPU.
    """

    def __init__(self, rows: Sequence[TouchedRows], embeddings: list[Tensor], aside: torch.cuda.Stream | None):
        self.rows, self.embeddings, self._aside = rows, embeddings, aside
        self._widths = [touched.width for touched in rows]
        self._done = None if aside is None else torch.cuda.current_stream(aside.device).record_event()
        self._users: set[torch.cuda.Stream] = set()
        self._is_current = False
        self._merged: torch.cuda.Event | None = None

    def _parts(self, whole: Tensor) -> list[tuple[TouchedRows, Tensor]]:
        """Every table's columns of ``[B, T, E]``."""
        return list(zip(self.rows, whole.split(self._widths, dim=-1), strict=True))

    def ready(self) -> None:
        """Lay over what was written since the fetch, the first time, and let the current stream wait for it."""
        if not self._is_current:
            with torch.cuda.stream(self._aside):  # it waits for the writes, so they are seen whole
                if self._catch_up() and self._aside is not None:
                    self._done = self._aside.record_event()
            self._is_current = True  # only now: a patch that failed is tried again, and never passed over
        self.use()

    def _catch_up(self) -> bool:
        """Whether there were newer writes."""
        stale = any(touched.is_stale for touched in self.rows)
        if stale:
            self.use()
        parts = [[part for _, part in self._parts(embeddings)] for embeddings in self.embeddings]
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
            for embeddings in self.embeddings:
                embeddings.record_stream(stream)

    def merge(self, micro: int, grad: Tensor) -> None:
        """Add a gradient ``[B, T, E]`` of a micro-batch's embeddings to the rows' own, aside."""
        if self._aside is not None:  # the gradient is there when the current stream is, and read until aside is
            self._aside.wait_stream(torch.cuda.current_stream(self._aside.device))
            grad.record_stream(self._aside)
        with torch.cuda.stream(self._aside):
            self.use()
            for touched, part in self._parts(grad):
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

    def release(self) -> None:
        """Let go of the embeddings."""
        self.embeddings = []


def expanded(rows: Sequence[TouchedRows], dtype: torch.dtype) -> list[Tensor]:
    """The embeddings ``[B, T, E]`` of every micro-batch, of fetched rows of all tables of a layer."""
    widths = [touched.width for touched in rows]
    embeddings = [torch.empty((*shape, sum(widths)), dtype=dtype, device=rows[0].device) for shape in rows[0].shapes]
    for micro, whole in enumerate(embeddings):
        for touched, part in zip(rows, whole.split(widths, dim=-1), strict=True):
            touched.expand_ahead(micro, part)
    return embeddings
