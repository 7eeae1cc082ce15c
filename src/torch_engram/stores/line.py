"""Reads of one cache in line: they begin in an order and finish in the same one, a few of them under way at once.

A read that begins finds places that an earlier one has claimed and not filled yet. It may count on them only because
that one is finished first. On a GPU what begins and what finishes are two orders: a read's rows are looked for while
those of the one before still come.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

UNDER_WAY = 3
"""Reads that have begun and are not finished, at most: one looks for its rows, another's are brought, and a third's are
put in place."""
_BEGIN, _FINISH = "begin", "finish"


class Line:
    """The line of one cache on ``device``. What is enqueued where reads begin runs there in the order of these blocks,
    whatever the streams, and so does what is enqueued where they finish. A read begins on one thread and may be
    finished by another; it is who finishes that waits on the device for what was begun."""

    def __init__(self, device: torch.device):
        self._device = device
        self._moves, self._enqueues = threading.Condition(), threading.Lock()
        self.issued = 0
        """Numbers given so far; the first read has 0."""
        self._begun = self._finished = 0
        self._last: dict[str, torch.cuda.Stream] = {}
        """Where either order was enqueued last."""

    @contextmanager
    def join(self) -> Iterator[int]:
        """For what a read begins with; gives its number. Waits until there is room. A read that fails here has left."""
        with self._moves:
            number = self._take_number()
            while self._begun != number:
                self._moves.wait()
        try:
            with self._enqueues:
                self._order(_BEGIN)
                yield number
        except BaseException:
            self._move(begun=1)
            self.leave(number)
            raise
        self._move(begun=1)

    @contextmanager
    def head(self, number: int) -> Iterator[None]:
        """For what read ``number`` ends with, when all before it are finished; it leaves with the block."""
        with self._moves:
            while self._finished != number:
                self._moves.wait()
        try:
            with self._enqueues:
                self._order(_FINISH)
                yield
        finally:
            self._move(finished=1)

    def leave(self, number: int) -> None:
        """Read ``number`` ends with nothing."""
        with self.head(number):
            pass

    def alone(self, stream: torch.cuda.Stream | None = None) -> _Alone:
        """For a whole read, when all before it are finished, on ``stream`` or the current one. All others wait."""
        return _Alone(self, stream)

    def _take_number(self) -> int:
        while self.issued - self._finished >= UNDER_WAY:
            self._moves.wait()
        self.issued += 1
        return self.issued - 1

    def _move(self, begun: int = 0, finished: int = 0) -> None:
        with self._moves:
            self._begun += begun
            self._finished += finished
            self._moves.notify_all()

    def _order(self, which: str, stream: torch.cuda.Stream | None = None) -> None:
        """Let what is enqueued from here on follow what was in this order before."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device) if stream is None else stream
        last = self._last.get(which)
        if last is None or last.cuda_stream != stream.cuda_stream:
            if last is not None:
                stream.wait_stream(last)
            self._last[which] = stream


class _Alone:
    """What :meth:`Line.alone` gives: no generator, since every step of decoding comes here."""

    def __init__(self, line: Line, stream: torch.cuda.Stream | None):
        self._line, self._stream = line, stream

    def __enter__(self) -> None:
        line = self._line
        line._moves.acquire()
        try:
            number = line._take_number()
            while line._finished != number:
                line._moves.wait()
        except BaseException:
            line._moves.release()
            raise
        line._order(_BEGIN, self._stream)
        line._order(_FINISH, self._stream)

    def __exit__(self, *_: object) -> None:
        self._line._move(begun=1, finished=1)
        self._line._moves.release()
