"""A memory bank: one named memory's addressing, tables and row optimiser, behind two calls, prefetch and read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_engram.addressing import Addressing, CanonicalVocab, LayerLayout, Lookup
from torch_engram.config import EngramConfig, nearest
from torch_engram.memory.prepared import PreparedLayer
from torch_engram.memory.rows import Table, TouchedRows
from torch_engram.memory.source import Source
from torch_engram.memory.tokens import Tokens
from torch_engram.memory.working_set import Memory, WorkingSet
from torch_engram.optim import RowOptimizer
from torch_engram.stores import CODECS, DeviceStore, HostStore, Plane, RecordLayout, RowFormat, Store, WritableStore
from torch_engram.window import Window

StoreFactory = Callable[[RecordLayout, Mapping[int, int], torch.device], Store]

PLACEMENTS: dict[str, StoreFactory] = {
    "device": DeviceStore,
    "host": lambda layout, spaces, device: HostStore(layout, spaces, pinned=device.type == "cuda"),
}


class MemoryBank:
    """The tables of one memory and everything that is done to them.

    ``vocab``: the tokenizer's canonical vocabulary (scheme ``engram``). ``optimizer``: called with the bank's proxy
    parameters, returns the row optimiser; a bank without one can only be read. ``placement``: where rows live, a name
    from :data:`PLACEMENTS` or a function that makes a store. ``codec``: how values are stored, fp32 or bf16, and in a
    bank that is only read also fp16, fp8 or int8. ``device``, ``dtype``: of the embeddings, so the backbone's.
    ``layouts``: a checkpoint's. Raises ``ValueError`` naming what does not fit.
    """

    def __init__(
        self,
        config: EngramConfig,
        vocab: CanonicalVocab | None = None,
        *,
        optimizer: Callable[[list[nn.Parameter]], RowOptimizer] | None = None,
        placement: str | StoreFactory = "device",
        codec: str = "fp32",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str = "engram",
        seed: int = 0,
        layouts: Mapping[int, LayerLayout] | None = None,
    ):
        require_known(codec, placement)
        if optimizer is not None:
            require_trainable(codec)
        self.config, self.name, self.dtype, self.device = config, name, dtype, torch.device(device)
        self.codec, self.seed = codec, seed
        self.addressing = Addressing(config, vocab, layouts)
        self.tables = list(tables_of(config, self.addressing.layouts))
        self._proxies = [nn.Parameter(torch.empty(0, table.dim, device=self.device)) for table in self.tables]
        self.optimizer = optimizer(self._proxies) if optimizer is not None else None
        self._sources = self._make_sources(placement)
        self.saved: tuple[Path, str, tuple[int, ...]] | None = None
        """Where the rows were last saved to or loaded from: folder, digest of its contents, since when stores count."""
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{name}-prefetch")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.aside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        """A GPU's stream for what is done in a step beside the network: newer writes laid over, gradients merged."""

    def parameters(self) -> list[nn.Parameter]:
        """One proxy a table: between ``reduce()`` and ``apply()`` it is the step's rows ``[U, dim]`` and their
        gradient, so ``clip_grad_norm_`` sees them; otherwise it is empty."""
        return self._proxies

    @property
    def rows(self) -> int:
        """Rows over all tables."""
        return sum(table.rows for table in self.tables)

    def rows_per_order(self) -> dict[int, tuple[int, ...]]:
        """Rows of every layer, one number an order; what a layer is padded with counts to the last."""
        found = {}
        for layer, layout in self.addressing.layouts.items():
            rows = [sum(order) for order in layout.primes]
            rows[-1] += layout.rows - sum(rows)
            found[layer] = tuple(rows)
        return found

    @property
    def table_parameters(self) -> int:
        """Numbers in all rows of all tables."""
        return sum(table.rows * table.dim for table in self.tables)

    def new_history(self, drafts: int = 0) -> Window:
        """An empty decoding history, for :class:`Tokens`."""
        return self.addressing.new_history(drafts)

    # -- reading --------------------------------------------------------------------------------------------------

    def prefetch(self, *micro_batches: Tokens | Tensor) -> WorkingSet:
        """Begin to fetch the rows of one optimiser step's micro-batches; returns at once.

        May be called any number of steps ahead: rows that change in between are done again at the first wait, and
        nothing else is. Each step ahead holds its rows with their planes, and the embeddings ``[B, T, E]`` of every
        layer and micro-batch, until it is applied or discarded. An id outside the vocabulary raises where the memory is
        waited for.
        """
        if not micro_batches:
            raise ValueError("prefetch() got no tokens: pass one micro-batch or more.")
        return self._begin([_as_tokens(batch) for batch in micro_batches], trains=self.optimizer is not None)

    def read(self, tokens: Tokens | Tensor) -> Memory:
        """The memory of some tokens, for a forward without training."""
        return self._begin([_as_tokens(tokens)], trains=False)[0]

    def _begin(self, batches: Sequence[Tokens], trains: bool) -> WorkingSet:
        rows: dict[int, list[TouchedRows]] = {layer: [] for layer in self.config.layers}
        for table, source in zip(self.tables, self._sources, strict=True):
            rows[table.layer].append(TouchedRows(table, source))
        before = None if self._stream is None else torch.cuda.current_stream(self.device).record_event()
        lookups = self._worker.submit(self._lookups, batches, before)
        if any(batch.history is not None for batch in batches):
            wait([lookups])  # a history is told of its tokens before the caller goes on and, say, crops it
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
        fetches = {
            layer: self._worker.submit(self._prepare, layer, tables, lookups, batches) for layer, tables in rows.items()
        }
        return WorkingSet(self, rows, fetches, len(batches), trains)

    def _lookups(self, batches: Sequence[Tokens], before: torch.cuda.Event | None) -> list[Lookup]:
        """Runs on the prefetch thread, as does :meth:`_fetch`."""
        with self._side_stream():
            if self._stream is not None and before is not None:
                self._stream.wait_event(before)
            grouped = any(source.store.grouped for source in self._sources)
            return [
                self.addressing.lookup(
                    batch.ids.to(self.device),
                    history=batch.history,
                    doc_start=batch.doc_start,
                    live=batch.live,
                    with_mixes=grouped,
                )
                for batch in batches
            ]

    def _fetch(
        self, layer: int, tables: Sequence[TouchedRows], lookups: Future[list[Lookup]], batches: Sequence[Tokens]
    ) -> None:
        with self._side_stream():
            found = [lookup(layer) for lookup in lookups.result()]
            live = [None if batch.live is None else batch.live.to(self.device) for batch in batches]
            for rows in tables:
                rows.fetch(found, live)

    def _prepare(
        self, layer: int, tables: Sequence[TouchedRows], lookups: Future[list[Lookup]], batches: Sequence[Tokens]
    ) -> PreparedLayer:
        """All that can be done before the step, on the prefetch thread; what a later write changes is done again."""
        self._fetch(layer, tables, lookups, batches)
        with self._side_stream():
            return PreparedLayer(tables, self.dtype, self.aside)

    def _side_stream(self) -> torch.cuda.StreamContext | nullcontext[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def settle(self) -> None:
        """Return when the prefetch thread has nothing left to enqueue, so that it leaves the device alone."""
        self._worker.submit(int).result()  # it does one thing after the other

    # -- writing --------------------------------------------------------------------------------------------------

    def _bind(self, rows: Sequence[TouchedRows]) -> None:
        """Let proxies and optimiser state be the rows of one step."""
        assert self.optimizer is not None
        for proxy, touched in zip(self._proxies, rows, strict=True):
            assert touched.planes is not None
            proxy.data = touched.planes["value"]
            proxy.grad = touched.total_grad()
            self.optimizer.state[proxy] = touched.planes

    def _step(self, rows: Sequence[TouchedRows]) -> None:
        assert self.optimizer is not None
        if not self._holds(rows):
            raise ValueError("Another step was reduced after this one: apply or discard each before the next reduce().")
        if any(touched.epoch != touched.source.newest for touched in rows):
            self._unbind(rows)
            raise ValueError(
                "Another step was applied after this one read its rows: apply each step before the next one is read."
            )
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self.optimizer.step()
            for touched in rows:
                touched.write()
        self._unbind(rows)

    def _holds(self, rows: Sequence[TouchedRows]) -> bool:
        """Whether the proxies are these rows."""
        assert self.optimizer is not None
        bound = (self.optimizer.state.get(proxy) for proxy in self._proxies)
        return all(planes is touched.planes for planes, touched in zip(bound, rows, strict=True))

    def _unbind(self, rows: Sequence[TouchedRows]) -> None:
        """Empty the proxies, unless they are another step's rows by now."""
        assert self.optimizer is not None
        if not self._holds(rows):
            return
        for proxy in self._proxies:
            proxy.grad = None
            proxy.data = proxy.data.new_empty(0, proxy.shape[1])
        self.optimizer.state.clear()

    def flush(self) -> None:
        """Return when every write is in the store."""
        for source in self._sources:
            if isinstance(source.store, WritableStore):
                source.store.flush()

    # -- tables ---------------------------------------------------------------------------------------------------

    def source(self, table: Table) -> Source:
        """The store, record format and recent writes behind a table."""
        return self._sources[self.tables.index(table)]

    def _planes(self, table: Table) -> tuple[Plane, ...]:
        own = self.optimizer.planes(table.dim) if self.optimizer is not None else ()
        return Plane("value", table.dim, self.codec), Plane("count", 1, "int32"), *own

    def _make_sources(self, placement: str | StoreFactory) -> list[Source]:
        """One source a table; tables whose records are alike share a store."""
        make = PLACEMENTS[placement] if isinstance(placement, str) else placement
        layouts = [RecordLayout(self._planes(table)) for table in self.tables]
        sources: dict[RecordLayout, Source] = {}
        for layout in layouts:
            if layout not in sources:
                spaces = {
                    table.space: table.rows for table, own in zip(self.tables, layouts, strict=True) if own == layout
                }
                try:
                    store = make(layout, spaces, self.device)
                except (MemoryError, torch.OutOfMemoryError) as error:
                    size = sum(spaces.values()) * layout.nbytes / 2**30
                    state, smaller = (" with their optimiser state", "RowwiseAdam, ") if self.optimizer else ("", "")
                    raise ValueError(
                        f"The tables of memory {self.name!r} take {size:,.1f} GiB{state}, which {self.device} does not "
                        f"have: lower rows_per_head, or use {smaller}codec='bf16' or placement='host'."
                    ) from error
                if self.optimizer is not None and not isinstance(store, WritableStore):
                    raise ValueError(
                        f"{type(store).__name__} is read-only: leave out the optimizer, or use another store."
                    )
                sources[layout] = Source(store, RowFormat(layout, self.seed, self.config.init_std))
        return [sources[layout] for layout in layouts]


def require_known(codec: str, placement: str | StoreFactory) -> None:
    """Raises ``ValueError`` for a codec or a placement that is none, with the nearest one."""
    holds_values = [name for name in CODECS if name != "int32"]
    if codec not in holds_values:
        raise ValueError(f"There is no codec {codec!r} for values: {nearest(codec, holds_values)}")
    if isinstance(placement, str) and placement not in PLACEMENTS:
        raise ValueError(f"There is no placement {placement!r}: {nearest(placement, PLACEMENTS)}")


def require_trainable(codec: str) -> None:
    """Raises ``ValueError`` for a codec that loses small updates."""
    if not CODECS[codec].trains:
        trains = " or ".join(repr(name) for name, known in CODECS.items() if known.trains and name != "int32")
        raise ValueError(f"codec={codec!r} rounds small updates away: train in {trains}, or leave out the optimizer.")


def _as_tokens(tokens: Tokens | Tensor) -> Tokens:
    if isinstance(tokens, Tensor):
        return Tokens(tokens)
    if not isinstance(tokens, Tokens):
        raise ValueError(f"Tokens come as an int64 tensor [B, T] or as Tokens, not as a {type(tokens).__name__}.")
    return tokens


def tables_of(config: EngramConfig, layouts: Mapping[int, LayerLayout]) -> Iterator[Table]:
    """A memory's tables: a layer's columns, split where the row width changes from one order to the next; spaces number
    them."""
    sizes = zip(config.per_order("row_dim"), config.per_order("heads"), strict=True)
    columns = [(dim, order) for order, (dim, heads) in enumerate(sizes) for _ in range(heads)]
    space = 0
    for layer in config.layers:
        bounds = (*layouts[layer].offsets, layouts[layer].rows)
        first = 0
        for dim, run in groupby(columns, key=lambda column: column[0]):
            orders = tuple(order for _, order in run)
            last = first + len(orders)
            yield Table(layer, space, slice(first, last), bounds[first], bounds[last] - bounds[first], dim, orders)
            first, space = last, space + 1
