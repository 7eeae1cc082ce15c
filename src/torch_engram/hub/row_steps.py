"""Rows of a training loop that knows a model, an optimiser, and nothing of working sets.

Every forward prefetches its own micro-batch. When its backward is done, its rows join those of the step's earlier
micro-batches and are bound to the bank's proxies: clipping finds them there, and a
:class:`~torch_engram.memory.JoinedOptimizer` applies them. Where several processes train the model, each keeps all rows.
What they read of them they tell each other at the end of a backward, when they average the gradients of weights, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_engram.hub.peers import Peers
from torch_engram.memory import Memory, MemoryBank, Tokens, WorkingSet
from torch_engram.memory.checkpoint import facts


class RowSteps:
    """The working sets of one bank, from forward to step."""

    def __init__(self, bank: MemoryBank):
        self._bank = bank
        self._step: WorkingSet | None = None
        """The rows of all backwards since the last step."""

    def follow(self, peers: Peers | None) -> Backward:
        """The backward of a forward that begins now, whose gradients are averaged with ``peers``."""
        return Backward(self, self._bank, peers)

    def backward_is_done(self, rows: WorkingSet | None, peers: Peers | None) -> None:
        """Bind the step's rows, with those of one more micro-batch; None where it has read none."""
        if rows is None:  # other ranks may have: take part
            rows = self._bank.prefetch(Tokens(torch.zeros(1, 1, dtype=torch.int64), live=torch.zeros(1, 1).bool()))
        if self._step is not None and not self._step.done:
            zeroed = self._bank.reduced is self._step and all(p.grad is None for p in self._bank.parameters())
            if zeroed:  # a step that was skipped
                self._step.discard()
            else:
                rows.absorb(self._step)
        self._step = rows
        if peers is not None and peers.meet:
            assert peers.group is not None
            rows.average(peers.group, self._state())
        rows.awaits_ranks = peers is not None and not peers.meet
        rows.reduce()

    def _state(self) -> int:
        """The same on ranks with the same rows: what they mean, where they began, and how often they were written."""
        writes = [self._bank.source(table).newest for table in self._bank.tables]
        told = f"{self._meaning} {self._bank.origin} {writes}"
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:7])

    @cached_property
    def _meaning(self) -> str:
        return json.dumps([facts(self._bank), type(self._bank.optimizer).__name__])


class Backward:
    """One forward whose backward is followed, if it comes."""

    def __init__(self, steps: RowSteps, bank: MemoryBank, peers: Peers | None):
        self._steps, self._bank, self._peers = steps, bank, peers
        self._rows: WorkingSet | None = None
        self._has_gradients = self._is_coming = False

    def read(self, tokens: Tokens) -> Memory:
        """The memory of the forward's tokens, whose gradients become those of rows."""
        rows = self._rows = self._bank.prefetch(tokens)
        listened: set[int] = set()

        def wait(layer: int) -> Mapping[str, Tensor]:
            found = rows[0].wait(layer)
            if layer not in listened and found:
                listened.add(layer)
                (leaf,) = found.values()
                leaf.register_post_accumulate_grad_hook(self._after)
            return found

        return Memory(wait)  # type: ignore[arg-type]

    def begins_at(self, output: Any) -> None:
        """Where other ranks take part, they do so whatever this one reads: from the gradient of the decoder's output."""
        if self._peers is not None and self._peers.meet:
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._comes())

    def _after(self, leaf: Tensor) -> None:
        """A layer's gradient has come."""
        if self._peers is not None and self._peers.group is None:
            raise ValueError(
                f"Rank {dist.get_rank()} of {dist.get_world_size()} trains memory {self._bank.name!r} by itself, so its "
                "rows would become others than those of other ranks: wrap the model in DistributedDataParallel, as "
                "Trainer does, and call that."
            )
        self._has_gradients = True
        self._comes()

    def _comes(self) -> None:
        """Ask, once, for what is done at the backward's end."""
        if not self._is_coming:
            self._is_coming = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._is_done)

    def _is_done(self) -> None:
        self._steps.backward_is_done(self._rows if self._has_gradients else None, self._peers)
