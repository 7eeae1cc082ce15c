"""One thing that several threads and streams work on, one after the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Turns:
    """Turns at what lies on ``device``: a thread waits for the one before, and its stream for what that enqueued.

    A turn may be entered by one thread and left by another.
    """

    def __init__(self, device: torch.device):
        self._device, self._lock = device, threading.Lock()
        self._last: torch.cuda.Stream | None = None

    def enter(self) -> None:
        """From here on nobody else has a turn; what the current stream is given comes after the last turn's."""
        self._lock.acquire()
        if self._last is not None:
            stream = torch.cuda.current_stream(self._device)
            if stream != self._last:
                stream.wait_stream(self._last)

    def leave(self) -> None:
        """The turn is over, on the stream that is current now."""
        if self._device.type == "cuda":
            self._last = torch.cuda.current_stream(self._device)
        self._lock.release()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A turn for as long as the block takes."""
        self.enter()
        try:
            yield
        finally:
            self.leave()
