"""Controls of a memory: the same modules and tables, whose rows say nothing of the n-gram that reads them.

What a model with such a memory gains over one without comes of the added projections alone, or of noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_engram.addressing import Addressing, LayerLayout, Lookup
from torch_engram.train import Trainer

ONE_ROW, SHUFFLED = "one row a head", "shuffled rows"
Change = Callable[[Tensor, LayerLayout], Tensor]
"""From row ids int64 ``[B, T, C]`` of a layer to others."""


def control(trainer: Trainer, name: str) -> None:
    """Let the memories of a trainer that has not begun read other rows. Raises ``ValueError`` for an unknown name."""
    if name not in (ONE_ROW, SHUFFLED):
        raise ValueError(f"There is no control {name!r}: use {ONE_ROW!r} or {SHUFFLED!r}.")
    for bank in trainer.banks.values():
        change = first_rows if name == ONE_ROW else _Shuffle(trainer.recipe.seed)
        bank.addressing = _Changed(bank.addressing, change)


def first_rows(rows: Tensor, layout: LayerLayout) -> Tensor:
    """Every n-gram reads the first row of each head."""
    return torch.tensor(layout.offsets, device=rows.device).expand_as(rows)


class _Shuffle:
    """Every occurrence of an n-gram reads rows drawn anew, evenly out of each head's."""

    def __init__(self, seed: int):
        self._seed, self._generators = seed, dict[torch.device, torch.Generator]()

    def __call__(self, rows: Tensor, layout: LayerLayout) -> Tensor:
        if rows.device not in self._generators:
            self._generators[rows.device] = torch.Generator(rows.device).manual_seed(self._seed)
        offsets, sizes = (torch.tensor(each, device=rows.device) for each in (layout.offsets, layout.flat_primes))
        drawn = torch.randint(1 << 62, rows.shape, generator=self._generators[rows.device], device=rows.device)
        return offsets + drawn % sizes


class _Changed(Addressing):
    """Another addressing, whose row ids are changed as they are found."""

    def __init__(self, addressing: Addressing, change: Change):
        vars(self).update(vars(addressing))
        self._change = change

    def lookup(self, tokens: Tensor, **named: Any) -> Lookup:
        """See :meth:`Addressing.lookup`."""
        found = super().lookup(tokens, **named)
        changed = {}
        for layer, layout in self.layouts.items():  # now, on this thread's stream
            mixes, rows = found(layer)
            changed[layer] = mixes, self._change(rows, layout).contiguous()
        return Lookup(changed.__getitem__, self.layouts)
