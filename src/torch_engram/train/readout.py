"""What a step tells about itself, read when the device has its next step already: asking at once would make it wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """One step's numbers."""

    step: int
    loss: float
    norm: float
    """Of all gradients, before clipping."""


class Readout:
    """Losses and gradient norms on their way from the device."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def send(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Begin to bring a step's scalars over; returns at once."""
        values = torch.stack((loss, norm))
        if not values.is_cuda:
            self._under_way.append((step, values, None))
            return
        here = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)
        self._under_way.append((step, here, torch.cuda.current_stream(values.device).record_event()))

    def read(self, behind: int) -> Iterator[Reading]:
        """The steps not yet read but for the last ``behind``, oldest first, each waited for. On a CPU all of them."""
        while self._under_way and (len(self._under_way) > behind or self._under_way[0][2] is None):
            step, values, arrived = self._under_way.popleft()
            if arrived is not None:
                arrived.synchronize()
            yield Reading(step, *values.tolist())
