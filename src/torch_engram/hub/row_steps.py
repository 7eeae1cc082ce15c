"""Rows of a training loop that knows a model, an optimiser, and nothing of working sets.

Every forward prefetches its own micro-batch. When its backward is done, its rows join those of the step's earlier
micro-batches and are bound to the bank's proxies: clipping finds them there, and a
:class:`~torch_engram.memory.JoinedOptimizer` applies them. Where several processes train the model, each keeps all
rows. What they read of them they tell each other at the end of a backward that averages the gradients of weights, too.
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
        self._task, self._coming = -1, list[Backward]()
        """The backward that is under way, as autograd numbers it, and the forwards that it has come to."""

    def follow(self, peers: Peers | None) -> Backward:
        """The backward of a forward that begins now, whose gradients are averaged with ``peers``."""
        return Backward(self, self._bank, peers)

    def comes(self, backward: Backward) -> None:
        """A forward's backward has begun; what is done when the whole of it ends is asked for by the first one."""
        task = torch._C._current_graph_task_id()
        if task != self._task:  # and what an earlier one that failed has come to is past
            self._task, self._coming = task, []
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._is_done)
        self._coming.append(backward)

    def _is_done(self) -> None:
        """Bind the step's rows with those that the backward has come to, and meet other ranks, once."""
        came, self._task, self._coming = self._coming, -1, []
        every = [backward.peers for backward in came if backward.peers is not None]
        group = next((peers.group for peers in every if peers.meet), None)
        for rows in [backward.rows for backward in came if backward.rows is not None] or [self._nothing()]:
            self._join(rows)
        assert self._step is not None
        if group is not None:
            self._step.average(group, self._state())
        self._step.awaits_ranks = group is None and bool(every)
        self._step.reduce()

    def _join(self, rows: WorkingSet) -> None:
        """The rows of the step are ``rows`` and those that it had."""
        if self._step is not None and not self._step.done:
            zeroed = self._bank.reduced is self._step and all(p.grad is None for p in self._bank.parameters())
            if zeroed:  # a step that was skipped
                self._step.discard()
            else:
                rows.absorb(self._step)
        self._step = rows

    def _nothing(self) -> WorkingSet:
        """For a rank that has read nothing, to take part with: others may have."""
        return self._bank.prefetch(Tokens(torch.zeros(1, 1, dtype=torch.int64), live=torch.zeros(1, 1).bool()))

    def _state(self) -> int:
        """The same on ranks with the same rows: what they mean, where they began, and how often they were written."""
        writes = [self._bank.source(table).newest for table in self._bank.tables]
        told = f"{self._meaning} {self._bank.origin} {writes}"
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:7])

    @cached_property
    def _meaning(self) -> str:
        return json.dumps([facts(self._bank), type(self._bank.optimizer).__name__])


class Backward:
    """Of one forward, if it comes."""

    def __init__(self, steps: RowSteps, bank: MemoryBank, peers: Peers | None):
        self.peers = peers
        self._steps, self._bank = steps, bank
        self._read: WorkingSet | None = None
        self._has_begun = self._has_rows = False

    @property
    def rows(self) -> WorkingSet | None:
        """Those that it has given gradients to."""
        return self._read if self._has_rows else None

    def read(self, tokens: Tokens) -> Memory:
        """The memory of the forward's tokens, whose gradients become those of rows."""
        rows = self._read = self._bank.prefetch(tokens)

        def wait(layer: int) -> Mapping[str, Tensor]:
            return {name: self._heard(leaf) for name, leaf in rows[0].wait(layer).items()}

        return Memory(wait)  # type: ignore[arg-type]

    def _heard(self, leaf: Tensor) -> Tensor:
        """The same numbers, whose gradient is told of. The graph alone owns that hook: on the leaf, which the working
        set has, it would keep both alive for as long as no backward comes."""
        with torch.enable_grad():
            seen = leaf.view_as(leaf)
        seen.register_hook(self._after)
        return seen

    def begins_at(self, output: Any) -> None:
        """Where ranks meet, each takes part whatever it has read: from the gradient of the decoder's output on."""
        if self.peers is not None and self.peers.meet:
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._begins())

    def _after(self, grad: Tensor) -> None:
        """A layer's gradient comes."""
        if self.peers is not None and self.peers.group is None:
            raise ValueError(
                f"Rank {dist.get_rank()} of {dist.get_world_size()} trains memory {self._bank.name!r} by itself, so "
                "its rows would become others than those of other ranks: wrap the model in DistributedDataParallel, as "
                "Trainer does, and call that."
            )
        self._has_rows = True
        self._begins()

    def _begins(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._steps.comes(self)
