"""A working set: the rows that one optimiser step touches, from fetch to write-back.

- ``step = bank.prefetch(tokens)`` returns at once; rows are fetched and expanded beside it;
- ``model(tokens, step[0])`` waits for each layer's embeddings where the layer reads them;
- ``loss.backward()`` fills the rows' gradients;
- ``step.reduce()`` binds them to ``bank.parameters()``, where clipping finds them;
- ``step.apply()`` takes one step of the row optimiser and writes the rows back to the store.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from torch_engram.memory.prepared import PreparedLayer
from torch_engram.memory.replicas import average
from torch_engram.memory.rows import TouchedRows

if TYPE_CHECKING:
    from torch_engram.memory.bank import MemoryBank


class Memory:
    """What a model is called with: for every layer, the embeddings of each named memory.

    ``wait(layer)`` returns ``{name: embeddings [B, T, E]}``, empty for a layer without memory; it blocks until that
    layer's rows are there, and no longer. Raises what went wrong in the prefetch, such as a token id out of range.
    """

    def __init__(self, wait: Callable[[int], dict[str, Tensor]]):
        self.wait = wait


def join(*memories: Memory) -> Memory:
    """Several banks' memories as one, for a model that has several; their names must differ."""

    def wait(layer: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for memory in memories:
            for name, embeddings in memory.wait(layer).items():
                if name in found:
                    raise ValueError(f"Two memories are named {name!r} at layer {layer}: give each bank its own name.")
                found[name] = embeddings
        return found

    return Memory(wait)


class WorkingSet:
    """Made by :meth:`MemoryBank.prefetch`; index it with a micro-batch's number for that micro-batch's memory."""

    def __init__(
        self,
        bank: MemoryBank,
        rows: Mapping[int, list[TouchedRows]],
        fetches: Mapping[int, Future[PreparedLayer]],
        micro_batches: int,
        trains: bool,
    ):
        self._bank, self._rows, self._fetches = bank, rows, fetches
        self._micro_batches, self._trains = micro_batches, trains
        self._leaves: dict[tuple[int, int], Tensor] = {}
        self._state = "open"  # then "reduced", then "done"
        self.awaits_ranks = False
        """Whether other ranks' gradients are still to come, so that it must not be applied."""

    def __len__(self) -> int:
        """Number of micro-batches."""
        return self._micro_batches

    def __getitem__(self, micro: int) -> Memory:
        """The memory of micro-batch ``micro``."""
        self._require(micro)
        return Memory(lambda layer: self._wait(layer, micro))

    @property
    def touched(self) -> int:
        """U over all tables: the distinct rows that this step touches, of those that this rank holds. Waits for all of
        them."""
        if self._bank.exchange is not None:  # bringing rows up to date is for all ranks together
            return sum(rows.distinct for fetch in self._fetches.values() for rows in fetch.result().rows)
        return sum(rows.distinct for rows in self._all_rows())

    def _require(self, micro: int) -> None:
        if not 0 <= micro < self._micro_batches:
            raise IndexError(f"This working set has {self._micro_batches} micro-batches, no number {micro}.")

    # -- reading --------------------------------------------------------------------------------------------------

    def _layer(self, layer: int) -> PreparedLayer:
        """The layer, fetched and up to date."""
        prepared = self._fetches[layer].result()
        prepared.ready()
        return prepared

    def _ready(self, layer: int) -> Sequence[TouchedRows]:
        return self._layer(layer).rows

    def _all_rows(self) -> list[TouchedRows]:
        return [rows for layer in self._rows for rows in self._ready(layer)]

    def _embeddings(self, layer: int, micro: int) -> Tensor:
        if self.done:
            raise ValueError("This working set was applied or discarded: prefetch the tokens again.")
        return self._fetches[layer].result().embeddings(micro)

    def _wait(self, layer: int, micro: int) -> dict[str, Tensor]:
        if layer not in self._rows:
            return {}
        if (layer, micro) not in self._leaves:
            leaf = self._embeddings(layer, micro)
            self._leaves[layer, micro] = self._listen(leaf, layer, micro) if self._trains else leaf
        return {self._bank.name: self._leaves[layer, micro]}

    @torch.no_grad()
    def expand(self, layer: int, micro: int, out: Tensor) -> Tensor:
        """The rows of one layer at the positions of micro-batch ``micro``, in ``out`` ``[B, T, E]``; returns ``out``.

        Raises ``ValueError`` when ``out`` has another shape.
        """
        self._require(micro)
        embeddings = self._embeddings(layer, micro)
        if out.shape != embeddings.shape:
            raise ValueError(f"The embeddings of layer {layer} are {list(embeddings.shape)}, not {list(out.shape)}.")
        out.copy_(embeddings)
        if (layer, micro) not in self._leaves:
            self._fetches[layer].result().let_go(micro)
        return out

    def merge(self, layer: int, micro: int, grad: Tensor) -> None:
        """Add a gradient of what :meth:`expand` gave, ``[B, T, E]``, to the rows' own. A leaf from :meth:`Memory.wait`
        does so by itself. A GPU reads ``grad`` beside the current stream: leave it as it is until :meth:`reduce`."""
        self._expect("open", "a backward comes before reduce()")
        self._layer(layer).merge(micro, grad)

    def _listen(self, leaf: Tensor, layer: int, micro: int) -> Tensor:
        """Merge the leaf's gradient in the backward, as soon as it is there, so that no two are held at once; the
        embeddings are then held by nobody here."""
        this = weakref.ref(self)  # the leaf must not keep its working set alive

        def merge(leaf: Tensor) -> None:
            working_set = this()
            if working_set is None or working_set._state == "done":
                raise ValueError("A backward came after its working set was applied or discarded: run it before.")
            if leaf.grad is not None:
                working_set.merge(layer, micro, leaf.grad)
            leaf.grad = None
            working_set._leaves.pop((layer, micro), None)
            working_set._fetches[layer].result().let_go(micro)

        leaf.requires_grad_().register_post_accumulate_grad_hook(merge)
        return leaf

    def of(self, bank: MemoryBank) -> bool:
        """Whether ``bank`` made it."""
        return self._bank is bank

    @property
    def done(self) -> bool:
        """Whether it was applied or discarded."""
        return self._state == "done"

    # -- writing --------------------------------------------------------------------------------------------------

    def reduce(self) -> None:
        """Bring the rows' gradients together and bind rows, gradients and planes to the bank's proxies.

        Every row that a live position read is updated by :meth:`apply`, whatever its gradient.
        """
        if not self._trains:
            raise ValueError("This memory was only read: use prefetch(), on a bank that has an optimizer.")
        self._expect("open", "reduce() was called already")
        for layer in self._rows:
            prepared = self._layer(layer)
            prepared.join()
            with self._bank._on_its_device():
                for touched in prepared.rows:
                    touched.reduce()
        self._bank._bind(self, self._all_rows())
        self._state = "reduced"

    def absorb(self, other: WorkingSet) -> None:
        """Take over the rows and gradients of another working set of this bank and step, which is then discarded.

        For loops that meet one micro-batch after the other, and know them all only when the last backward is done.
        Raises ``ValueError`` for another bank's, and where rows are divided over ranks.
        """
        self._expect("open", "absorb() comes before reduce()")
        if not other.of(self._bank) or self._bank.exchange is not None:
            raise ValueError("A working set takes over those of its own bank alone, and of rows that one rank holds.")
        for step in (self, other):
            for layer in self._rows:
                step._layer(layer).join()
        for mine, theirs in zip(self._all_rows(), other._all_rows(), strict=True):
            mine.absorb(theirs)
        other.discard()

    def average(self, group: ProcessGroup, state: int) -> None:
        """Touch what the working set of any rank of ``group`` touches, with the mean of all ranks' gradients, where
        every rank keeps all rows: see :func:`~torch_engram.memory.replicas.average`. Collective."""
        assert self._bank.exchange is None, "rows that are divided over ranks are averaged by reduce()"
        self._expect("open", "average() comes before reduce()")
        for layer in self._rows:
            self._layer(layer).join()
        with self._bank._on_its_device():
            average(self._bank.name, self._all_rows(), group, state)

    def require_whole(self) -> None:
        """Raises ``ValueError`` when other ranks' gradients are still to come."""
        if self.awaits_ranks:
            raise ValueError(
                f"Other ranks' gradients of memory {self._bank.name!r} are still to come: run the last backward of a "
                "step outside no_sync()."
            )

    def norm(self) -> Tensor:
        """The Euclidean norm of all row gradients, those of all ranks, a scalar; it counts what clipping has done to
        them. Collective, where rows are divided over ranks."""
        self._expect("reduced", "call reduce() before norm()")
        norms = [rows.total_grad().norm() for rows in self._all_rows()]
        return self._bank._norm(torch.stack(norms).norm())

    def apply(self, scale: float = 1.0) -> None:
        """Multiply the gradients by ``scale``, take one step of the bank's optimiser, and write the rows back.

        Raises ``ValueError`` when another working set was applied after this one's rows were read, or other ranks'
        gradients are still to come.
        """
        self._expect("reduced", "call reduce() before apply()")
        self.require_whole()
        rows = self._all_rows()
        if scale != 1.0:
            for touched in rows:
                touched.total_grad().mul_(scale)
        self._bank._step(self, rows)
        self._close()

    def discard(self) -> None:
        """Drop the step: no row changes."""
        if self._state == "reduced":
            self._bank._unbind(self)
        self._close()

    def _expect(self, state: str, mend: str) -> None:
        if self._state == "done":
            raise ValueError("This working set was applied or discarded: prefetch the next step's tokens.")
        if self._state != state:
            raise ValueError(f"A working set goes prefetch, backward, reduce, apply: {mend}.")

    def _close(self) -> None:
        self._state = "done"
        self._leaves.clear()
        for layer in self._rows.values():
            for rows in layer:
                rows.release()
        for fetch in self._fetches.values():
            if not fetch.cancel():  # it is done or under way
                fetch.add_done_callback(_release)

    def __del__(self) -> None:
        self._close()


def _release(fetch: Future[PreparedLayer]) -> None:
    if not fetch.cancelled() and fetch.exception() is None:
        fetch.result().release()
