"""What holds while a run trains: it is alone in its folder, Ctrl-C waits for the step's end, kernels are as asked."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Raises ``ValueError`` when another process trains in ``folder``. A killed one holds nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    folder_itself = os.open(folder, os.O_RDONLY)
    try:
        _lock(folder_itself, folder)
        yield
    finally:
        os.close(folder_itself)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"Another process trains in {folder}: wait for it, or set another name= or out=.") from error


@contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls ``stop``; a second one raises ``KeyboardInterrupt`` at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: whoever runs it there stops it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def deterministic_kernels(on: bool) -> Iterator[None]:
    """With ``on``, only kernels that repeat bit for bit; afterwards as before."""
    if not on:
        yield
        return
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
