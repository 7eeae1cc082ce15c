"""A memory at fixed addresses, for a network that is captured in a CUDA graph.

The graph holds the network alone. Around every replay, the rows that the step touches are brought to where the graph
reads them, and the gradients that it left are merged::

    fixed = FixedMemory(bank, batch_size, seq_len)
    with torch.cuda.graph(graph):
        network(tokens, fixed).backward()
    ahead = bank.prefetch(batches[0])
    for batch, following in zip(batches, batches[1:]):
        step, ahead = ahead, bank.prefetch(following)
        tokens.copy_(batch)
        fixed.load(step)
        graph.replay()
        fixed.merge()
        step.reduce()
        step.apply()
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_engram.memory.bank import MemoryBank
from torch_engram.memory.working_set import Memory, WorkingSet


class FixedMemory(Memory):
    """The embeddings ``[B, T, E]`` of every layer of ``bank``, always the same tensors.

    ``wait(layer)`` makes the bank's current stream wait for that layer's rows, and is recorded by a capture: a replay
    computes its first layers while those of later ones are patched and copied. On a CPU there is nothing to wait for.
    """

    def __init__(self, bank: MemoryBank, batch_size: int, seq_len: int):
        super().__init__(self._wait)
        self._bank = bank
        self._embeddings = {
            layer: torch.zeros(batch_size, seq_len, bank.config.embedding_dim, dtype=bank.dtype, device=bank.device)
            for layer in bank.config.layers
        }
        if bank.optimizer is not None:
            for leaf in self._embeddings.values():
                leaf.requires_grad_().grad = torch.zeros_like(leaf)
        self._stream: torch.cuda.Stream | None = None
        self._arrived: dict[int, torch.cuda.Event] = {}
        if bank.device.type == "cuda":
            self._stream = torch.cuda.Stream(bank.device)
            for layer in self._embeddings:  # external: a node of the graph, which waits for what happens outside
                self._arrived[layer] = torch.cuda.Event(external=True)
                self._arrived[layer].record(self._stream)  # an event that was never recorded is not waited for
        self._loaded: tuple[WorkingSet, int] | None = None

    def _wait(self, layer: int) -> dict[str, Tensor]:
        if layer not in self._embeddings:
            return {}
        if layer in self._arrived:
            self._arrived[layer].wait(torch.cuda.current_stream(self._bank.device))
        return {self._bank.name: self._embeddings[layer]}

    def load(self, step: WorkingSet, micro: int = 0) -> None:
        """Fill the embeddings with micro-batch ``micro`` of ``step``. On a GPU it returns when the prefetch has been
        enqueued, before the embeddings are patched and copied.

        Raises ``ValueError`` when the step is another bank's, its tokens are not ``[B, T]``, or the gradients of the
        one before were not merged.
        """
        if not step.of(self._bank):
            raise ValueError(f"This step is another bank's: load those that memory {self._bank.name!r} prefetched.")
        if self._loaded is not None and not self._loaded[0].done and self._bank.optimizer is not None:
            raise ValueError("The gradients of the step before are not merged yet: call merge() after each replay.")
        if self._stream is not None:
            assert self._bank.aside is not None
            self._stream.wait_stream(torch.cuda.current_stream(self._bank.device))  # the last replay still reads,
            self._stream.wait_stream(self._bank.aside)  # and so does the merge of its gradients
        for layer, leaf in self._embeddings.items():
            with torch.cuda.stream(self._stream), torch.no_grad():
                step.expand(layer, micro, out=leaf)
                if leaf.grad is not None:
                    leaf.grad.zero_()
            if layer in self._arrived:
                self._arrived[layer].record(self._stream)
        self._loaded = step, micro

    def merge(self) -> None:
        """Give the gradients of the embeddings to the step that was loaded.

        Raises ``ValueError`` when there is none, or the bank has no optimizer.
        """
        if self._loaded is None or self._bank.optimizer is None:
            raise ValueError("There are no gradients to merge: load() a step of a bank with an optimizer first.")
        (step, micro), self._loaded = self._loaded, None
        if self._stream is not None:  # gradients that the graph leaves alone were zeroed there
            torch.cuda.current_stream(self._bank.device).wait_stream(self._stream)
        for layer, leaf in self._embeddings.items():
            assert leaf.grad is not None
            step.merge(layer, micro, leaf.grad)
