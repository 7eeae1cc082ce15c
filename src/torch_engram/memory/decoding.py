"""The memory of decoding: one token of each of many sequences at a time, at fixed addresses and with few launches.

A model's step may be captured in CUDA graphs; what it reads is brought beside them::

    memory = DecodeMemory(bank, sequences)
    history = bank.new_history()
    model(prompts, bank.read(Tokens(prompts, history=history)))
    memory.begin(history)
    while True:
        ready = torch.cuda.current_stream().record_event()   # memory.ids hold the step's tokens
        before_the_memory.replay()
        memory.read(memory.ids, after=ready)
        with_the_memory.replay()                             # captured with memory.wait(layer); writes memory.ids
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_engram.kernels import use_kernels
from torch_engram.memory.bank import MemoryBank
from torch_engram.memory.tokens import Tokens
from torch_engram.memory.working_set import Memory
from torch_engram.stores import LoadedStore, NgramCache
from torch_engram.stores.pinned import pinned
from torch_engram.window import Window


class DecodeMemory(Memory):
    """The embeddings ``[B, 1, E]`` of every layer of ``bank`` for the next token of B ``sequences``, always the same
    tensors.

    ``wait(layer)`` makes the current stream wait for them, and is recorded by a capture. On a GPU, tables in files that
    are in its memory or behind a cache are read by graphs of a few launches, which find rows from ids on the device;
    all others as :meth:`MemoryBank.read` reads them.
    """

    def __init__(self, bank: MemoryBank, sequences: int):
        super().__init__(self._wait)
        self._bank = bank
        self.ids = torch.zeros(sequences, 1, dtype=torch.int64, device=bank.device)
        """Where :meth:`read` takes ids from without a copy."""
        layers = bank.config.layers
        whole = torch.zeros(len(layers), sequences, bank.config.embedding_dim, dtype=bank.dtype, device=bank.device)
        self._embeddings = {layer: part[:, None] for layer, part in zip(layers, whole, strict=True)}
        self._history = bank.new_history()
        self._replayed = ReplayedReads(bank, self.ids, whole) if _can_replay(bank, self.ids) else None

    def begin(self, history: Window) -> None:
        """Go on after what ``history``, which is left as it is, has seen of the B sequences; an empty one begins them.

        Raises ``ValueError`` for another number of sequences.
        """
        last = history.last()
        if last and len(last[0]) != len(self.ids):
            raise ValueError(f"This memory decodes {len(self.ids)} sequences, and the history has {len(last[0])}.")
        self._history = self._bank.new_history()
        if last:
            self._history.push(*(part.to(self._bank.device) for part in last))
        if self._replayed is not None:
            self._replayed.begin(self._history)

    def read(self, ids: Tensor, after: torch.cuda.Event | None = None) -> None:
        """Begin to read for the next token of every sequence: ids int64 ``[B, 1]`` on the bank's device.

        ``after``: when the ids are there and the last embeddings have been used; the read then runs beside what the
        current stream is given, and otherwise on it. Returns when all is enqueued, for which rows that the host has to
        bring want this thread for a moment. Raises ``ValueError`` for an id outside the vocabulary; where nothing has
        to come from the host, only at the next read.
        """
        if ids is not self.ids and ids.shape != self.ids.shape:
            raise ValueError(f"Ids are {list(ids.shape)}: this memory decodes {list(self.ids.shape)}.")
        if self._replayed is not None:
            self._replayed.read(ids, after)
            return
        memory = self._bank.read(Tokens(ids, history=self._history))
        for layer, embeddings in self._embeddings.items():
            embeddings.copy_(memory.wait(layer)[self._bank.name])

    def _wait(self, layer: int) -> dict[str, Tensor]:
        if layer not in self._embeddings:
            return {}
        if self._replayed is not None:
            self._replayed.wait()
        return {self._bank.name: self._embeddings[layer]}


class ReplayedReads:
    """What a :class:`DecodeMemory` replays: ids ``[B, 1]`` to embeddings ``[layers, B, E]``, on a stream of its own."""

    def __init__(self, bank: MemoryBank, ids: Tensor, out: Tensor):
        from torch_engram.stores.replays import CachedReplay, LoadedReplay

        self._bank, self._ids = bank, ids
        shape = (len(ids), bank.config.max_ngram)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=bank.device)
        self._start = torch.zeros(shape, dtype=torch.bool, device=bank.device)
        self._dead = torch.ones_like(self._start)
        self._stranger = pinned((1,), torch.bool, bank.device).zero_()
        self._strange = self._stranger.numpy()  # the same byte, looked at in every step
        self._stream = torch.cuda.Stream(bank.device, priority=-1)  # its kernels are short, and a model waits for them
        self._waiting: int | None = None
        """The stream that waits already."""
        self._arrived = torch.cuda.Event(external=True)
        self._arrived.record(self._stream)  # an event that was never recorded is not waited for
        store, spaces = bank.source(bank.tables[0]).store, [table.space for table in bank.tables]
        self._stream.wait_stream(torch.cuda.current_stream(bank.device))
        with torch.cuda.stream(self._stream):
            if isinstance(store, NgramCache):
                self._replay: CachedReplay | LoadedReplay = CachedReplay(store, spaces, self._addressed, out)
            else:
                assert isinstance(store, LoadedStore)
                first_rows = [table.first_row for table in bank.tables]
                self._replay = LoadedReplay(store, spaces, first_rows, self._addressed, out)
        self.begin(bank.new_history())

    def _addressed(self) -> tuple[Tensor, Tensor]:
        push(self._ids, self._tokens, self._start, self._dead)
        context = self._tokens.shape[1] - 1
        window = (self._tokens, self._start, self._dead, context, self._stranger)
        mixes, rows = self._bank.addressing.rows_at_once(*window)
        return mixes.flatten(1, 2), rows.flatten(1, 2)

    def begin(self, history: Window) -> None:
        """See :meth:`DecodeMemory.begin`."""
        last = history.last()
        with torch.cuda.stream(self._stream):
            self._dead.fill_(True)  # what was before the first token is seen by no n-gram
            self._start.fill_(False)
            self._stranger.fill_(False)
            for mine, theirs in zip((self._tokens, self._start, self._dead), last, strict=False):
                mine[:, mine.shape[1] - theirs.shape[1] :] = theirs
        torch.cuda.synchronize(self._bank.device)

    def read(self, ids: Tensor, after: torch.cuda.Event | None) -> None:
        """See :meth:`DecodeMemory.read`."""
        stream, before = self._stream, torch.cuda.current_stream()
        if after is not None:
            stream.wait_event(after)
        else:
            stream = before if before.device == stream.device else torch.cuda.current_stream(stream.device)
        if stream is not before:
            torch.cuda.set_stream(stream)  # as the context torch.cuda.stream() does, in a quarter of its time
        try:
            if ids is not self._ids:
                self._ids.copy_(ids)
            self._replay.run(stream)
            self._arrived.record(stream)
        finally:
            if stream is not before:
                torch.cuda.set_stream(before)
        self._waiting = stream.cuda_stream
        if self._strange[0]:
            self._strange[0] = False
            self._bank.addressing.require_known(ids)

    def wait(self) -> None:
        """Let the current stream wait for the last read; once is enough, except for a graph that is being captured."""
        stream = torch.cuda.current_stream(self._stream.device)
        if self._waiting != stream.cuda_stream or torch.cuda.is_current_stream_capturing():
            self._arrived.wait(stream)
            self._waiting = stream.cuda_stream


def push(ids: Tensor, tokens: Tensor, start: Tensor, dead: Tensor) -> None:
    """Move windows ``[B, N]`` of tokens, document starts and dead flags on by one, to end with ``ids`` ``[B, 1]``."""
    if use_kernels(tokens):
        from torch_engram.memory.decode_kernels import push_triton

        push_triton(ids, tokens, start, dead)
    else:
        push_naive(ids, tokens, start, dead)


def push_naive(ids: Tensor, tokens: Tensor, start: Tensor, dead: Tensor) -> None:
    """See :func:`push`."""
    for window, last in ((tokens, ids), (start, False), (dead, False)):
        window[:, :-1] = window[:, 1:].clone()
        window[:, -1:] = last


def _can_replay(bank: MemoryBank, ids: Tensor) -> bool:
    """Whether a step is read by graphs."""
    return (
        use_kernels(ids) and bank.replayable and isinstance(bank.source(bank.tables[0]).store, NgramCache | LoadedStore)
    )
