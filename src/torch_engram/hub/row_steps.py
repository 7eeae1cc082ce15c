"""Rows of a training loop that knows a model, an optimiser, and nothing of working sets.

Every forward prefetches its own micro-batch. When its backward is done, its rows join those of the step's earlier
micro-batches and are bound to the bank's proxies: clipping finds them there, and a
:class:`~torch_engram.memory.JoinedOptimizer` applies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_engram.memory import Memory, MemoryBank, Tokens, WorkingSet


class RowSteps:
    """The working sets of one bank, from forward to step."""

    def __init__(self, bank: MemoryBank):
        self._bank = bank
        self._step: WorkingSet | None = None
        """The rows of all backwards since the last step."""
        self._coming: WorkingSet | None = None
        """Those whose backward is under way."""

    def forward(self, tokens: Tokens) -> Memory:
        """The memory of one micro-batch, whose backward is to be followed."""
        rows = self._bank.prefetch(tokens)
        listened: set[int] = set()

        def wait(layer: int) -> Mapping[str, Tensor]:
            found = rows[0].wait(layer)
            if layer not in listened and found:
                listened.add(layer)
                (leaf,) = found.values()
                leaf.register_post_accumulate_grad_hook(partial(self._after, rows))
            return found

        return Memory(wait)  # type: ignore[arg-type]

    def _after(self, rows: WorkingSet, leaf: Tensor) -> None:
        """A layer's gradient has come; what is done at a backward's end is asked for by the first one."""
        if rows is not self._coming:
            self._coming = rows
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._backward_is_done, rows))

    def _backward_is_done(self, rows: WorkingSet) -> None:
        self._coming = None
        if self._step is not None and not self._step.done:
            zeroed = self._bank.reduced is self._step and all(p.grad is None for p in self._bank.parameters())
            if zeroed:  # a step that was skipped
                self._step.discard()
            else:
                rows.absorb(self._step)
        self._step = rows
        rows.reduce()
