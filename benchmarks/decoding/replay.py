"""Decoding by CUDA graphs: every step takes the next token of each of B sequences out of a text, as if sampled.

A model without memory is one graph a step, or two. With one it is two: while the first layers are computed, the rows of
this step's tokens are read, and the second graph waits for them where the memory enters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from decoding.attention import RaggedCache
from decoding.model import DecodeModel
from torch_engram.fusion import Engram
from torch_engram.memory import MemoryBank, Tokens
from torch_engram.window import Window

LAYER = 2
"""The block at whose entry the memory is added."""
PROMPT = 16
"""Tokens of each sequence that a memory has seen when the first step begins."""


class StepMemory(Protocol):
    """A memory at fixed addresses for one token of each sequence: ``torch_engram.memory.DecodeMemory``."""

    ids: Tensor
    """int64 ``[B, 1]``, where a step's tokens are read without a copy."""

    def begin(self, history: Window) -> None:
        """Go on after the prompts that ``history`` has seen."""

    def read(self, ids: Tensor, *, after: torch.cuda.Event | None = None) -> None:
        """Begin to bring the rows of ids ``[B, 1]``, which are there at ``after``."""

    def wait(self, layer: int) -> dict[str, Tensor]:
        """Embeddings ``[B, 1, E]`` by the memory's name."""


class Batch:
    """What all ways to decode share, always at the same addresses: a text ``[B, T]``, of which ``PROMPT`` tokens are
    the prompts' last ones, the cache of keys and values, a step's hidden states and its logits."""

    def __init__(self, model: DecodeModel, cache: RaggedCache, text: Tensor):
        self.model, self.cache, self.text = model, cache, text.to(model.device)
        sequences = len(text)
        self.hidden = torch.zeros(sequences, model.shape.hidden, dtype=model.dtype, device=model.device)
        self.logits = torch.zeros(sequences, model.shape.vocab, dtype=model.dtype, device=model.device)
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        """Of all graphs: one runs after the other, and none leaves anything in it for the next."""
        self._next = torch.zeros(1, dtype=torch.int64, device=model.device)

    def begin(self, ids: Tensor, at: int) -> None:
        """Let the next step be the one of the text's column ``at``, in ``ids`` ``[B, 1]``, on sequences of their first
        lengths."""
        self.cache.reset()
        ids.copy_(self.text[:, at : at + 1])
        self._next.fill_(at + 1)

    def advance(self, ids: Tensor) -> None:
        """The end of a step, in a graph."""
        self.cache.lengths.add_(1)
        torch.index_select(self.text, 1, self._next, out=ids)
        self._next.add_(1)


class Remembered:
    """A memory and the module that adds it. ``bank``: where its rows are."""

    def __init__(self, bank: MemoryBank, memory: StepMemory, engram: Engram):
        self.bank, self.memory, self._engram = bank, memory, engram

    def begin(self, text: Tensor, at: int) -> None:
        """Go on after the columns of ``text`` before ``at``."""
        history = self.bank.new_history()
        self._read(text, at, history)
        self.memory.begin(history)

    def require_right(self, text: Tensor, at: int) -> None:
        """Raises ``ValueError`` unless what was read last is what the bank reads for the column of ``text`` before
        ``at``."""
        if not torch.equal(self.memory.wait(LAYER)[self.bank.name], self._read(text, at)[:, -1:]):
            raise ValueError("The embeddings of a step are not those of its tokens, so nothing is timed.")

    def _read(self, text: Tensor, at: int, history: Window | None = None) -> Tensor:
        """Embeddings of the ``PROMPT`` columns before ``at``."""
        tokens = Tokens(text[:, at - PROMPT : at].contiguous(), history=history)
        return self.bank.read(tokens).wait(LAYER)[self.bank.name]

    def add(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[B, d]`` with the memory of this step added."""
        streams = self._engram(hidden[:, None, None], self.memory.wait(LAYER)[self.bank.name])
        assert isinstance(streams, Tensor)
        return streams[:, 0, 0]


class Decoding:
    """One way to decode. ``remembered``: None without a memory; ``graphs``: 1 only without one."""

    def __init__(self, batch: Batch, remembered: Remembered | None = None, graphs: int = 2):
        assert graphs == 2 or remembered is None, "the rows of a step are read beside its first graph"
        self.batch, self.remembered, self._at = batch, remembered, PROMPT
        self._ids = torch.zeros_like(batch.text[:, :1]) if remembered is None else remembered.memory.ids
        cuda = batch.model.device.type == "cuda"
        self._ready = torch.cuda.Event() if cuda else None
        parts = [self._first, self._rest] if graphs == 2 else [self._whole]
        self._parts: list[Callable[[], None]] = list(parts)
        self._begin()
        for _ in range(2):  # what is compiled or allocated once is so before the capture
            self.step()
        if cuda:
            if remembered is not None:
                remembered.bank.settle()  # another thread that asks for memory now would spoil the capture
            self._parts = [captured(part, batch) for part in parts]
        if remembered is not None:
            remembered.begin(batch.text, self._at)

    def _begin(self) -> None:
        self.batch.begin(self._ids, self._at)
        if self.remembered is not None:
            self.remembered.begin(self.batch.text, self._at)

    def rate(self, steps: int) -> float:
        """Tokens a second over ``steps``, the device waited for before the first and after the last. Sequences begin
        at their first lengths, their text goes on where it was left."""
        self.batch.begin(self._ids, self._at)
        self._at += steps
        assert self._at < self.batch.text.shape[1], "the text is at its end"
        self._synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._synchronize()
        return len(self.batch.text) * steps / (time.perf_counter() - start)

    def require_right(self) -> None:
        """Raises ``ValueError`` when the memory of the last step was another one's."""
        if self.remembered is not None:
            self.remembered.require_right(self.batch.text, self._at)

    def step(self) -> None:
        """One token of each sequence."""
        if self._ready is not None:
            self._ready.record()  # this step's ids are there, and the embeddings of the last one were read
        self._parts[0]()
        if self.remembered is not None:
            self.remembered.memory.read(self._ids, after=self._ready)
        for part in self._parts[1:]:
            part()

    @torch.no_grad()
    def _first(self) -> None:
        self.batch.model.embed(self._ids[:, 0], self.batch.hidden)
        self.batch.model.run(self.batch.hidden, self.batch.cache, range(LAYER))

    @torch.no_grad()
    def _rest(self) -> None:
        model, hidden = self.batch.model, self.batch.hidden
        if self.remembered is not None:
            hidden = self.remembered.add(hidden)
        model.run(hidden, self.batch.cache, range(LAYER, model.shape.layers))
        model.predict(hidden, self.batch.logits)
        self.batch.advance(self._ids)

    def _whole(self) -> None:
        self._first()
        self._rest()

    def _synchronize(self) -> None:
        if self._ready is not None:
            torch.cuda.synchronize(self.batch.model.device)


def captured(work: Callable[[], None], batch: Batch) -> Callable[[], None]:
    """``work`` as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=batch.pool, capture_error_mode="thread_local"):
        work()
    return graph.replay
