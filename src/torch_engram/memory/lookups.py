"""What addressing has found of a prefetch's micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torch_engram.addressing import Lookup


@dataclass(frozen=True)
class Lookups:
    """Every micro-batch's rows, and when they are there."""

    batches: list[Lookup]
    done: torch.cuda.Event | None

    def wait(self) -> None:
        """Let the current stream wait until they are."""
        if self.done is not None:
            self.done.wait()
