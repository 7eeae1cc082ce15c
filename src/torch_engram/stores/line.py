"""Reads of one cache in line: they begin in an order and finish in the same one, a few of them under way at once.

A read that begins finds places that an earlier one has claimed and not filled yet. It may count on them only because
that one is finished first. On a GPU what begins and what finishes are two orders: a read's rows are looked for while
those of the one before still come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

UNDER_WAY = 3
"""Reads that have begun and are not finished, at most: one looks for its rows, another's are brought, and a third's are
put in place."""


class Line:
    """The line of one cache on ``device``. What is enqueued where reads begin runs there in the order of these blocks,
    whatever the streams, and so does what is enqueued where they finish. A read begins on one thread and may be
    finished by another; it is who finishes that waits on the device for what was begun."""

    def __init__(self, device: torch.device):
        self._device = device
        self._room = threading.Semaphore(UNDER_WAY)
        self._moves, self._enqueues = threading.Condition(), threading.Lock()
        self.issued = 0
        """Numbers given so far; the first read has 0."""
        self._begun = self._finished = 0
        self._last: dict[str, torch.cuda.Stream] = {}

    @contextmanager
    def join(self) -> Iterator[int]:
        """For what a read begins with; gives its number. Waits until there is room. A read that fails here has left."""
        number = self._take_number()
        self._wait(lambda: self._begun == number)
        try:
            with self._enqueuing("begin"):
                yield number
        except BaseException:
            self._move(begun=1)
            self.leave(number)
            raise
        self._move(begun=1)

    @contextmanager
    def head(self, number: int) -> Iterator[None]:
        """For what read ``number`` ends with, when all before it are finished; it leaves with the block."""
        self._wait(lambda: self._finished == number)
        try:
            with self._enqueuing("finish"):
                yield
        finally:
            self._move(finished=1)
            self._room.release()

    def leave(self, number: int) -> None:
        """Read ``number`` ends with nothing."""
        with self.head(number):
            pass

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For a whole read, when all before it are finished."""
        number = self._take_number()
        self._wait(lambda: self._finished == number)
        try:
            with self._enqueuing("begin", "finish"):
                yield
        finally:
            self._move(begun=1, finished=1)
            self._room.release()

    def _take_number(self) -> int:
        self._room.acquire()
        with self._moves:
            self.issued += 1
            return self.issued - 1

    def _wait(self, come: Callable[[], bool]) -> None:
        with self._moves:
            self._moves.wait_for(come)

    def _move(self, begun: int = 0, finished: int = 0) -> None:
        with self._moves:
            self._begun += begun
            self._finished += finished
            self._moves.notify_all()

    @contextmanager
    def _enqueuing(self, *orders: str) -> Iterator[None]:
        with self._enqueues:
            if self._device.type == "cuda":
                stream = torch.cuda.current_stream(self._device)
                for last in {self._last.get(order, stream) for order in orders} - {stream}:
                    stream.wait_stream(last)
                self._last |= dict.fromkeys(orders, stream)
            yield
