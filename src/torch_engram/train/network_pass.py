"""One micro-batch forward and backward: as it is, or replayed from a CUDA graph.

A pass knows nothing of optimisers, and of the rows only what the network reads. It leaves gradients in the parameters
and in the working sets, and returns its part of the step's loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_engram.data import IGNORE_INDEX, Batch
from torch_engram.memory import FixedMemory, Memory, MemoryBank, WorkingSet, join
from torch_engram.models import Decoder
from torch_engram.train.loss import head_loss

_WARM_UP = 2
"""Passes before a capture: the first compiles and makes the gradients, the second is as every later one."""


class NetworkPass:
    """Forward, loss and backward of one micro-batch.

    ``mixed``: whether products run in bf16. ``masked``: whether attention is given a mask where none is needed, too:
    without one it has no deterministic backward.
    """

    def __init__(self, decoder: Decoder, *, mixed: bool, masked: bool):
        self.decoder, self._mixed, self._masked = decoder, mixed, masked

    def __call__(self, batch: Batch, rows: Mapping[str, WorkingSet], micro: int, divisor: Tensor) -> Tensor:
        """The loss, a scalar: the sum over targets over ``divisor``, a scalar on the decoder's device.

        ``batch`` may lie on the host; its rows are number ``micro`` of each working set.
        """
        memory = join(*(step[micro] for step in rows.values())) if rows else None
        needs_mask = self._needs_mask(batch)
        batch = batch.to(divisor.device)
        return self._run(batch.tokens, batch.targets, batch.doc_start if needs_mask else None, memory, divisor)

    def _needs_mask(self, batch: Batch) -> bool:
        """Whole sequences of one document need none."""
        return self._masked or bool(batch.doc_start[:, 1:].any())

    def _run(
        self, tokens: Tensor, targets: Tensor, doc_start: Tensor | None, memory: Memory | None, divisor: Tensor
    ) -> Tensor:
        with torch.autocast(divisor.device.type, torch.bfloat16, enabled=self._mixed):
            hidden = self.decoder(tokens, memory, doc_start=doc_start, return_hidden=True)
            assert isinstance(hidden, Tensor)
            loss = head_loss(hidden, self.decoder.head.weight, targets, self.decoder.pad_bias, divisor)
        loss.backward()
        return loss.detach()


class CapturedPass(NetworkPass):
    """The same, captured after some passes: the host then launches one graph in place of thousands of kernels.

    A step's first micro-batch, number 0, overwrites the parameters' gradients, and has a graph of its own; those that
    follow add to them. Batches are ``batch_size`` sequences of ``seq_len`` tokens, and either all are given a mask
    (``masked``) or none may need one. Passes that take turns, step by step, may share a ``pool`` of memory; whatever
    else is in it must not be used while a pass runs.
    """

    def __init__(
        self,
        decoder: Decoder,
        banks: Mapping[str, MemoryBank],
        batch_size: int,
        seq_len: int,
        *,
        mixed: bool,
        masked: bool,
    ):
        super().__init__(decoder, mixed=mixed, masked=masked)
        self.pool = torch.cuda.graph_pool_handle()
        self._banks = banks
        device = decoder.embedding.weight.device
        self._tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64, device=device)
        self._targets = torch.full_like(self._tokens, IGNORE_INDEX)
        self._doc_start = torch.zeros(batch_size, seq_len, dtype=torch.bool, device=device) if masked else None
        self._divisor = torch.ones((), device=device)
        self._memories = {name: FixedMemory(bank, batch_size, seq_len) for name, bank in banks.items()}
        self._stream = torch.cuda.Stream(device)
        self._passes = 0
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by whether they add, each with its loss
        self._grads: list[tuple[Tensor, Tensor]] = []  # parameters, and their gradients in the graphs

    def __call__(self, batch: Batch, rows: Mapping[str, WorkingSet], micro: int, divisor: Tensor) -> Tensor:
        """See :class:`NetworkPass`; everything is brought to where the graph reads it."""
        assert batch.tokens.shape == self._tokens.shape, "a captured pass takes batches of one shape"
        assert self._masked or not self._needs_mask(batch), "a pass without masks met documents side by side"
        self._tokens.copy_(batch.tokens, non_blocking=True)
        self._targets.copy_(batch.targets, non_blocking=True)
        self._divisor.copy_(divisor, non_blocking=True)
        if self._doc_start is not None:
            self._doc_start.copy_(batch.doc_start, non_blocking=True)
        try:
            for name, memory in self._memories.items():
                memory.load(rows[name], micro)
            loss = self._replay(adds=micro > 0)
            for memory in self._memories.values():
                memory.merge()
        except BaseException:
            for step in rows.values():  # a step that is given up need not be merged before the next one is loaded
                step.discard()
            raise
        return loss

    def _replay(self, adds: bool) -> Tensor:
        """The loss of what was loaded, by a graph as soon as there is one. ``adds``: to the gradients there are."""
        if self._passes < _WARM_UP or (adds and not self._graphs):
            self._passes += 1
            current = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                loss = self._compute()
            current.wait_stream(self._stream)
            return loss
        if adds not in self._graphs:
            self._graphs[adds] = self._capture(adds)
        graph, loss = self._graphs[adds]
        graph.replay()
        for parameter, grad in self._grads:  # whoever zeroed them may have set them to None
            parameter.grad = grad
        return loss.clone()

    def _compute(self) -> Tensor:
        memory = join(*self._memories.values()) if self._memories else None
        return self._run(self._tokens, self._targets, self._doc_start, memory, self._divisor)

    def _capture(self, adds: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        for bank in self._banks.values():
            bank.settle()  # another thread that asks for memory now would spoil the capture
        if not adds:  # they are then made within the graph: nothing is zeroed, and nothing added to zeros
            self.decoder.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self._stream, capture_error_mode="thread_local"):
            loss = self._compute()
        if not adds:
            self._grads = [(each, each.grad) for each in self.decoder.parameters() if each.grad is not None]
        return graph, loss
