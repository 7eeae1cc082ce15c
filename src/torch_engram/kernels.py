"""Which form runs: the Triton kernels on a GPU, their naive twins everywhere else.

Every place that has two forms asks :func:`use_kernels`. Compiled code asks while it is traced, and is traced anew when
the answer changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["naive", "use_kernels"]

_naive = False  # of the process and not of a thread: rows are prefetched on another one


def use_kernels(tensor: Tensor) -> bool:
    """Whether work on ``tensor`` goes through kernels."""
    return _on_gpu(tensor) and not _naive


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


@contextmanager
def naive() -> Iterator[None]:
    """Within the block, no kernel of this library is launched from any thread: naive twins run on a GPU, too.

    A backward belongs into the block of its forward. What a bank prefetches on its own thread is fetched in the form
    that holds when it gets there: call :meth:`~torch_engram.memory.MemoryBank.settle` before the block ends. Rows that
    were prefetched before the block keep their form to the end of their step.
    """
    global _naive
    before, _naive = _naive, True
    try:
        yield
    finally:
        _naive = before
