"""One thing that several threads and streams work on, one after the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Turns:
    """Turns at what lies on ``device``: a thread waits for the one before, and its stream for what that enqueued."""

    def __init__(self, device: torch.device):
        self._device, self._lock = device, threading.Lock()
        self._last: torch.cuda.Event | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within the block, nobody else has a turn; what the current stream is given comes after the last turn's."""
        with self._lock:
            if self._last is not None:
                torch.cuda.current_stream(self._device).wait_event(self._last)
            try:
                yield
            finally:
                if self._device.type == "cuda":
                    self._last = torch.cuda.current_stream(self._device).record_event()
