"""What a bank does beside the thread that calls it: finding rows, fetching them, and making embeddings of them.

One thread finds and fetches, and does one thing after the other. What a cache misses is brought by a second one and put
in place by a third, so that the next rows are looked for, and gathered, meanwhile. Where a GPU brings its rows alone,
the first thread does it all, and what overlaps are streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from torch_engram.addressing import Lookup
from torch_engram.forks import OneProcess
from torch_engram.memory.lookups import Lookups
from torch_engram.memory.prepared import PreparedLayer, expanded
from torch_engram.memory.rows import TouchedRows

Rows = Mapping[int, Sequence[TouchedRows]]
"""Of every layer that is fetched its tables' rows."""
Prepared = Mapping[int, Future[PreparedLayer]]


class Fetch(Protocol):
    """What a prefetch reads without holding rows: of caches, or out of the device's memory."""

    @property
    def alone(self) -> bool:
        """Whether :meth:`bring` and :meth:`place` of what has begun wait for nothing, and may be enqueued on another
        stream than :meth:`begin`."""

    def begin(self) -> None:
        """Look for it, on the current stream and without waiting for rows. A read that fails here is not finished."""

    def bring(self) -> None:
        """Have the host bring what is missing. Raises what a store's ``fetch`` does; the read is not placed then."""

    def place(self) -> dict[int, list[Tensor]]:
        """For every layer the embeddings ``[B, T, E]`` of every micro-batch. Raises ``ValueError`` for an id outside
        the vocabulary, and what a store's ``fetch`` did for a read before this one."""


class Prefetcher:
    """The threads and streams of the memory ``name``, whose embeddings are of ``dtype`` on ``device``.

    ``cached``: rows come through caches by n-gram. On a GPU they are then found on another stream than they are brought
    on: finding waits for the device, which is busy with bringing. ``together``: other ranks fetch along, so that what
    was asked for is not given up.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, *, cached: bool, together: bool):
        self._device, self._dtype = device, dtype
        self._process = OneProcess(f"Memory {name!r}")
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{name}-prefetch")
        self._bringer = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{name}-bring")
        self._placer = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{name}-place")
        self._stream, self.aside, finding, self._placing = (
            torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(4)
        )
        """``aside`` is for what is done in a step beside the network: newer writes laid over, gradients merged."""
        self._finding = finding if cached else self._stream
        self._together = together

    def find(self, find: Callable[[], list[Lookup]], given: Iterable[Tensor] = ()) -> Future[Lookups]:
        """Have ``find`` called with what the current stream was given so far; it reads tensors that are ``given``."""
        self._process.require()
        now = None if self._finding is None else torch.cuda.current_stream(self._device).record_event()
        return self._worker.submit(self._find, find, given, now)

    def _find(self, find: Callable[[], list[Lookup]], given: Iterable[Tensor], now: torch.cuda.Event | None) -> Lookups:
        if self._finding is None or self._stream is None or now is None:
            return Lookups(find(), None)
        with torch.cuda.stream(self._finding):
            self._finding.wait_event(now)
            for tensor in given:
                if tensor.is_cuda:  # the caller may drop it before it has been read: masks by the other stream, too
                    tensor.record_stream(self._finding)
                    tensor.record_stream(self._stream)
            return Lookups(find(), self._finding.record_event())

    def wait_for(self, lookups: Future[Lookups]) -> None:
        """Return when rows are found, and let the current stream wait for what was enqueued to find them."""
        wait([lookups])
        if self._finding is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._finding)

    def fetch(self, rows: Rows, lookups: Future[Lookups], live: Sequence[Tensor | None]) -> Prepared:
        """Have ``rows`` fetched for micro-batches with these masks, and expanded for the first, each layer by itself.

        What has begun is not cancelled any more.
        """
        prepared: dict[int, Future[PreparedLayer]] = {layer: Future() for layer in rows}
        for layer in rows:
            if self._together:
                prepared[layer].set_running_or_notify_cancel()
            self._worker.submit(self._prepare, prepared[layer], layer, rows[layer], lookups, live)
        return prepared

    def bring(self, fetch: Fetch, rows: Rows) -> Prepared:
        """As :meth:`fetch`, of ``rows`` that are not held."""
        self._process.require()
        prepared: dict[int, Future[PreparedLayer]] = {layer: Future() for layer in rows}
        self._worker.submit(self._begin, fetch, prepared, rows)
        return prepared

    def _prepare(
        self,
        prepared: Future[PreparedLayer],
        layer: int,
        tables: Sequence[TouchedRows],
        lookups: Future[Lookups],
        live: Sequence[Tensor | None],
    ) -> None:
        """All that can be done before the step; what a later write changes is done again."""
        if not self._together and not prepared.set_running_or_notify_cancel():
            return
        try:
            with _on(self._stream):
                lookups.result().wait()
                found = [lookup(layer) for lookup in lookups.result().batches]
                masks = [None if mask is None else mask.to(self._device) for mask in live]
                for touched in tables:
                    touched.fetch(found, masks)
                ahead = [] if self._together else [expanded(tables, 0, self._dtype)]  # not before rows have come
                prepared.set_result(PreparedLayer(tables, ahead, self.aside, self._dtype))
        except BaseException as error:
            try:
                for touched in tables:
                    touched.give_up()
            finally:
                prepared.set_exception(error)

    def _begin(self, fetch: Fetch, prepared: Prepared, rows: Rows) -> None:
        """All layers at once, as far as that goes without waiting for rows."""
        wanted = {layer: future for layer, future in prepared.items() if future.set_running_or_notify_cancel()}
        if not wanted:
            return
        try:
            with _on(self._stream):
                fetch.begin()
            if fetch.alone:
                with _on(self._placing):
                    fetch.bring()
                    self._place(fetch, wanted, rows)
            else:
                self._bringer.submit(self._bring, fetch, wanted, rows)
        except BaseException as error:
            _fail(wanted, error)

    def _bring(self, fetch: Fetch, prepared: Prepared, rows: Rows) -> None:
        try:
            with _on(self._stream):
                fetch.bring()
            self._placer.submit(self._place_brought, fetch, prepared, rows)
        except BaseException as error:
            _fail(prepared, error)

    def _place_brought(self, fetch: Fetch, prepared: Prepared, rows: Rows) -> None:
        try:
            with _on(self._stream):
                self._place(fetch, prepared, rows)
        except BaseException as error:
            _fail(prepared, error)

    def _place(self, fetch: Fetch, prepared: Prepared, rows: Rows) -> None:
        embeddings = fetch.place()
        for layer, future in prepared.items():
            future.set_result(PreparedLayer(rows[layer], embeddings[layer], self.aside))

    def settle(self) -> None:
        """Return when there is nothing left to enqueue, so that the device is left alone."""
        for thread in (self._worker, self._bringer, self._placer):
            thread.submit(int).result()  # each does one thing after the other


def _on(stream: torch.cuda.Stream | None) -> torch.cuda.StreamContext | nullcontext[None]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _fail(prepared: Prepared, error: BaseException) -> None:
    for future in prepared.values():
        if not future.done():
            future.set_exception(error)
