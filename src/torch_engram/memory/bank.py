"""A memory bank: one named memory's addressing, tables and row optimiser, behind two calls, prefetch and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torch_engram.addressing import Addressing, CanonicalVocab, LayerLayout, Lookup
from torch_engram.config import EngramConfig
from torch_engram.memory.cached_reads import CachedFetch, CachedReads, counts_by_order
from torch_engram.memory.direct_reads import DirectFetch, DirectReads, reads_directly
from torch_engram.memory.exchange import Exchange
from torch_engram.memory.file_tables import IN_PLACE, NEVER_WRITTEN, FileTables, Tables
from torch_engram.memory.lanes import LaneFetch, Lanes
from torch_engram.memory.lookups import Lookups
from torch_engram.memory.placement import PLACEMENTS, StoreFactory, make_sources, require_known, require_trainable
from torch_engram.memory.plain_reads import Reads
from torch_engram.memory.prefetching import Fetch, Prefetcher
from torch_engram.memory.rows import TouchedRows
from torch_engram.memory.sharded_rows import ShardedRows
from torch_engram.memory.source import Source
from torch_engram.memory.step_reads import StepReads, reads_at_once
from torch_engram.memory.tables import Table, tables_of
from torch_engram.memory.tokens import Tokens
from torch_engram.memory.working_set import Memory, WorkingSet
from torch_engram.optim import RowOptimizer, RowSinkhorn
from torch_engram.stores import NgramCache, Plane, RecordLayout, RowFormat, Shard, WritableStore
from torch_engram.window import Window


class MemoryBank:
    """The tables of one memory and everything that is done to them.

    ``vocab``: the tokenizer's canonical vocabulary (scheme ``engram``). ``optimizer``: called with the bank's proxy
    parameters, returns the row optimiser; a bank without one can only be read. ``tables``: safetensors files whose rows
    are served and never written to: a file, or a folder of shards, by the layers in the names of its tensors; or for
    every layer its :class:`~torch_engram.stores.named_tables.NamedTable` or (path, name of the tensor). ``placement``:
    where rows live, ``device``, ``host``, :func:`disk_rows` of a folder, or another function that makes a store; those
    of ``tables`` are loaded there, with ``host-shared`` once for all processes of a machine, or with ``disk`` and
    ``disk-direct`` read where they are, through the page cache or past it. ``cache``: bytes of ``device`` for rows that
    were read lately, a number or such as ``"8GB"``; none by default. ``codec``: how values are stored, by default fp32,
    or as the files have them; bf16, and in a bank that is only read also fp16, fp8 or int8. ``device``, ``dtype``: of
    the embeddings, so the backbone's. ``layouts``: a checkpoint's. ``group``: the ranks of :mod:`torch.distributed`
    that the rows are divided over; all of them then make the bank, and read and train in the same order. Raises
    ``ValueError`` naming what does not fit, ``OSError`` for a file that cannot be read or made.
    """

    def __init__(
        self,
        config: EngramConfig,
        vocab: CanonicalVocab | None = None,
        *,
        optimizer: Callable[[list[nn.Parameter]], RowOptimizer] | None = None,
        tables: Tables | None = None,
        placement: str | StoreFactory = "device",
        cache: int | str | None = None,
        codec: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str = "engram",
        seed: int = 0,
        layouts: Mapping[int, LayerLayout] | None = None,
        group: ProcessGroup | None = None,
    ):
        self.config, self.name, self.dtype, self.device = config, name, dtype, torch.device(device)
        self.addressing = Addressing(config, vocab, layouts)
        self.tables = list(tables_of(config, self.addressing.layouts))
        self.seed, self.in_files = seed, tables is not None
        """``in_files``: whether the rows are those of tables in files, which nobody changes."""
        self.exchange = None if group is None else self._divided(group, optimizer is not None)
        make = self._choose_stores(tables, placement, codec, optimizer is not None)
        self._proxies = [nn.Parameter(torch.empty(0, table.dim, device=self.device)) for table in self.tables]
        self.reduced: WorkingSet | None = None
        """The working set whose rows the proxies are, from its ``reduce()`` to its ``apply()`` or ``discard()``."""
        self.optimizer = optimizer(self._proxies) if optimizer is not None else None
        if self.exchange is not None and isinstance(self.optimizer, RowSinkhorn):
            self.optimizer.over_ranks = self.exchange.sum
        self._sources = make_sources(
            self.tables, [self._format(table) for table in self.tables], make,
            device=self.device, name=name, trains=optimizer is not None, cache=cache, shard=self.shard,
        )  # fmt: skip
        self._reads = self._choose_reads()
        at_once = reads_at_once(self._sources, self.device)
        self._step_reads = StepReads(self.tables, self._sources, dtype) if at_once else None
        self.saved: tuple[str, tuple[int, ...]] | None = None
        """What was last saved or loaded: its digest, and since when stores count changes of it."""
        self.origin = ""
        """The digest of the save that all rows were last loaded from; empty where they began here."""
        self._prefetcher = Prefetcher(
            name, self.device, dtype, cached=self._reads is CachedReads, together=self.exchange is not None
        )
        self._lanes: Lanes | None = None
        front = self._sources[0].store
        if isinstance(front, NgramCache) and self.replayable:
            self._lanes = Lanes(self.addressing, self.tables, front)

    def _choose_stores(
        self, tables: Tables | None, placement: str | StoreFactory, codec: str | None, trains: bool
    ) -> StoreFactory:
        """What makes the stores; settles the codec."""
        if tables is not None:
            if trains:
                raise ValueError(NEVER_WRITTEN)
            files = FileTables(tables, self.tables, codec, placement)
            self.codec = files.codec
            return files.make_store
        if isinstance(placement, str) and placement in IN_PLACE:
            raise ValueError(
                f"placement={placement!r} reads tables in files: give tables=, or use open_bank(); to "
                "train rows on disk, give placement=disk_rows(folder)."
            )
        self.codec = codec or "fp32"
        require_known(self.codec, placement)
        if trains:
            require_trainable(self.codec)
        return PLACEMENTS[placement] if isinstance(placement, str) else placement

    def _divided(self, group: ProcessGroup, trains: bool) -> Exchange:
        if not trains:
            raise ValueError(
                "Only rows that are trained are divided over ranks: give an optimizer, or leave out group=."
            )
        return Exchange(group, self.device)

    @property
    def shard(self) -> Shard | None:
        """Which of the rows this rank holds; None where it holds all."""
        return None if self.exchange is None else self.exchange.shard

    def _choose_reads(self) -> Callable[[Table, Source], TouchedRows]:
        """Rows are held where they are trained, and where they have to be brought with no cache to bring them to."""
        if self.exchange is not None:
            return partial(ShardedRows, exchange=self.exchange)
        if self.optimizer is not None:
            return TouchedRows
        if all(isinstance(source.store, NgramCache) for source in self._sources):
            return CachedReads
        return DirectReads if all(reads_directly(source, self.device) for source in self._sources) else TouchedRows

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

    @property
    def replayable(self) -> bool:
        """Whether a GPU's reads can be recorded: every layer has one table, all are in one store, and what is in a
        record is the row's value."""
        planes = {plane.name for source in self._sources for plane in source.format.layout.planes}
        one_each = [table.layer for table in self.tables] == list(self.config.layers)
        return one_each and len({source.store for source in self._sources}) == 1 and planes == {"value"}

    def new_history(self, drafts: int = 0) -> Window:
        """An empty decoding history, for :class:`Tokens`."""
        return self.addressing.new_history(drafts)

    # -- reading --------------------------------------------------------------------------------------------------

    def prefetch(self, *micro_batches: Tokens | Tensor) -> WorkingSet:
        """Begin to fetch the rows of one optimiser step's micro-batches; returns at once.

        May be called any number of steps ahead: rows that change in between are done again at the first wait, and
        nothing else is. Each step ahead holds its rows with their planes until it is applied or discarded, and the
        embeddings ``[B, T, E]`` of its first micro-batch; further ones' are made one ahead, and all are held until
        their gradient is merged. An id outside the vocabulary raises where the memory is waited for.
        """
        if not micro_batches:
            raise ValueError("prefetch() got no tokens: pass one micro-batch or more.")
        return self._begin([_as_tokens(batch) for batch in micro_batches], trains=self.optimizer is not None)

    def read(self, tokens: Tokens | Tensor) -> Memory:
        """The memory of some tokens, for a forward without training. A step of decoding is read now where rows are in
        the device's memory, and an id outside the vocabulary then raises here."""
        tokens = _as_tokens(tokens)
        if tokens.is_step and self._step_reads is not None:
            return self._read_now(tokens, self._step_reads)
        return self._begin([tokens], trains=False)[0]

    def _read_now(self, tokens: Tokens, reads: StepReads) -> Memory:
        with self._on_its_device(), torch.no_grad():
            found = reads.read(self._lookup(tokens), tokens.live)
        return Memory(lambda layer: {self.name: found[layer]} if layer in found else {})

    def read_rows(self, layer: int, rows: Tensor, mixes: Tensor | None = None) -> Memory:
        """The memory of row ids int64 ``[B, T, C]`` of one layer that somebody else has hashed, for a forward without
        training. Returns at once, and may be called on any thread.

        ``mixes``: the n-grams' mixes int64 ``[B, T, N-1]`` that the rows came from, needed where the bank is
        :attr:`grouped`.
        """
        assert mixes is not None or not self.grouped, "a store that keeps n-grams together wants their mixes"
        rows = rows.to(self.device)
        mixes = rows[..., :0] if mixes is None else mixes.to(self.device)

        def find() -> list[Lookup]:
            _require_rows(rows, layer, self.addressing.layouts[layer].rows)
            return [Lookup(lambda layer: (mixes, rows))]

        return self._fetch((layer,), self._prefetcher.find(find, (mixes, rows)), [None], trains=False)[0]

    @property
    def grouped(self) -> bool:
        """Whether a store keeps the heads of an n-gram together, and so is told of n-grams' mixes."""
        return any(source.store.grouped for source in self._sources)

    def _begin(self, batches: Sequence[Tokens], trains: bool) -> WorkingSet:
        live = [batch.live for batch in batches]
        if len(batches) == 1 and self._lanes is not None and self._lanes.take_in(batches[0]):
            rows = self._rows_of(self.config.layers)
            fetch = LaneFetch(self._lanes, _all(rows, CachedReads), batches[0], self.dtype)
            return WorkingSet(self, rows, self._prefetcher.bring(fetch, rows), 1, trains)
        given = [
            tensor for batch in batches for tensor in (batch.ids, batch.doc_start, batch.live) if tensor is not None
        ]
        lookups = self._prefetcher.find(lambda: [self._lookup(batch) for batch in batches], given)
        if any(batch.history is not None for batch in batches):
            self._prefetcher.wait_for(lookups)  # it is told of its tokens before the caller goes on and, say, crops it
        return self._fetch(self.config.layers, lookups, live, trains)

    def _lookup(self, batch: Tokens) -> Lookup:
        return self.addressing.lookup(
            batch.ids.to(self.device),
            history=batch.history,
            doc_start=batch.doc_start,
            live=batch.live,
            with_mixes=self.grouped,
        )

    def _fetch(
        self, layers: Sequence[int], lookups: Future[Lookups], live: Sequence[Tensor | None], trains: bool
    ) -> WorkingSet:
        """One entry of ``live`` a micro-batch."""
        rows = self._rows_of(layers)
        fetch: Fetch
        if self._reads is CachedReads:
            fetch = CachedFetch(_all(rows, CachedReads), lookups, live, self.dtype)
        elif self._reads is DirectReads:
            fetch = DirectFetch(_all(rows, DirectReads), lookups, live, self.dtype)
        else:
            return WorkingSet(self, rows, self._prefetcher.fetch(rows, lookups, live), len(live), trains)
        return WorkingSet(self, rows, self._prefetcher.bring(fetch, rows), len(live), trains)

    def _rows_of(self, layers: Sequence[int]) -> dict[int, list[TouchedRows]]:
        waits_for = {source: source.newest if source.in_use else 0 for source in self._sources}
        rows: dict[int, list[TouchedRows]] = {layer: [] for layer in layers}
        for table, source in zip(self.tables, self._sources, strict=True):
            if table.layer in rows:
                rows[table.layer].append(self._reads(table, source))
                rows[table.layer][-1].waits_for = waits_for[source]
        return rows

    def cache_counts(self) -> dict[tuple[int, int], dict[str, int]]:
        """What the cache has counted since the beginning, by (layer, order): ``hits``; ``misses``, which were fetched;
        ``repeats``, which a miss of the same step had brought; and of the misses ``evictions``, which took another's
        place, and ``overflow``, which found none. Counted are n-grams; in a bank that trains rows, those of all orders
        as order 0. Empty without a cache. Waits for the device."""
        return counts_by_order(self.tables, self._sources)

    def settle(self) -> None:
        """Return when the prefetch threads have nothing left to enqueue, so that they leave the device alone."""
        self._prefetcher.settle()

    @property
    def aside(self) -> torch.cuda.Stream | None:
        """A GPU's stream for what is done in a step beside the network."""
        return self._prefetcher.aside

    # -- writing --------------------------------------------------------------------------------------------------

    def _bind(self, step: WorkingSet, rows: Sequence[TouchedRows]) -> None:
        """Let proxies and optimiser state be the rows of one step."""
        assert self.optimizer is not None
        self.reduced = step
        for proxy, touched in zip(self._proxies, rows, strict=True):
            assert touched.planes is not None
            proxy.data = touched.planes["value"]
            proxy.grad = touched.total_grad()
            self.optimizer.state[proxy] = touched.planes

    def _step(self, step: WorkingSet, rows: Sequence[TouchedRows]) -> None:
        assert self.optimizer is not None
        if self.reduced is not step:
            raise ValueError("Another step was reduced after this one: apply or discard each before the next reduce().")
        if any(touched.epoch != touched.source.newest for touched in rows):
            self._unbind(step)
            raise ValueError(
                "Another step was applied after this one read its rows: apply each step before the next one is read."
            )
        with self._on_its_device():
            self.optimizer.step()
            for touched in rows:
                touched.write()
        self._unbind(step)

    def _on_its_device(self) -> AbstractContextManager[object]:
        """Within, kernels are launched where the rows are."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _norm(self, own: Tensor) -> Tensor:
        """Of the row gradients of all ranks, from that of this one's."""
        return own if self.exchange is None else self.exchange.norm(own)

    def _unbind(self, step: WorkingSet) -> None:
        """Empty the proxies, unless they are another step's rows by now."""
        assert self.optimizer is not None
        if self.reduced is not step:
            return
        self.reduced = None
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

    def _format(self, table: Table) -> RowFormat:
        value, count = Plane("value", table.dim, self.codec), Plane("count", 1, "int32")
        own = self.optimizer.planes(table.dim) if self.optimizer is not None else ()
        planes = (value,) if self.in_files else (value, count, *own)
        return RowFormat(RecordLayout(planes), self.seed, self.config.init_std)


def _all(rows: Mapping[int, Sequence[TouchedRows]], kind: type[Reads]) -> list[Reads]:
    """Of all layers, one after the other."""
    return [touched for tables in rows.values() for touched in tables if isinstance(touched, kind)]


def _require_rows(rows: Tensor, layer: int, there: int) -> None:
    """Here for all stores: those on a GPU do not look. Waits for the device."""
    if rows.numel():
        low, high = (int(bound) for bound in rows.aminmax())
        if low < 0 or high >= there:
            raise ValueError(
                f"Row {low if low < 0 else high:,} is not in layer {layer}, which has {there:,} rows: ask for 0 to "
                f"{there - 1:,}, or check that the configuration is the model's."
            )


def _as_tokens(tokens: Tokens | Tensor) -> Tokens:
    if isinstance(tokens, Tensor):
        return Tokens(tokens)
    if not isinstance(tokens, Tokens):
        raise ValueError(f"Tokens come as an int64 tensor [B, T] or as Tokens, not as a {type(tokens).__name__}.")
    return tokens
