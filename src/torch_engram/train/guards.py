"""What holds while a run trains: it is alone in its folder, Ctrl-C waits for the step's end, kernels are as asked."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import torch

from torch_engram.durable import alone_in


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Raises ``ValueError`` when another process of this machine trains in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(alone_in(folder, wait=False))
        except BlockingIOError as error:
            raise ValueError(
                f"Another process trains in {folder}: wait for it, or set another name= or out=."
            ) from error
        yield


@contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls ``stop``; a second one raises ``KeyboardInterrupt`` at once.

    Where Ctrl-C is ignored or somebody else's (``nohup``, another thread than the main one), it stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def deterministic_kernels(on: bool) -> Iterator[None]:
    """With ``on``, only kernels that repeat bit for bit; afterwards those that PyTorch chose before."""
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
