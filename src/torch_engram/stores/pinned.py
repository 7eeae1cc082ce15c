"""Host memory that a GPU's copy engine and kernels can reach: pinned, or registered where it is mapped already."""

from __future__ import annotations

import warnings
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from torch_engram.stores.pages import Bytes

_PORTABLE_MAPPED = 3
"""For the contexts of all GPUs, and for their kernels."""


def register(owner: object, memory: Bytes) -> None:
    """Pin mapped memory for as long as ``owner`` lives. Raises ``RuntimeError`` when the driver refuses."""
    runtime: Any = torch.cuda.cudart()
    refused = int(runtime.cudaHostRegister(memory.ctypes.data, len(memory), _PORTABLE_MAPPED))
    if refused:
        if torch.cuda.is_available():
            with suppress(RuntimeError):  # the next launch is told of this error, too
                torch.zeros(1, device="cuda")
        raise RuntimeError(f"CUDA error {refused} for {len(memory) / 1e9:,.1f} GB")
    weakref.finalize(owner, _unregister, runtime, memory).atexit = False


def _unregister(runtime: Any, memory: Bytes) -> None:
    runtime.cudaHostUnregister(memory.ctypes.data)


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory on the host, pinned where ``device`` is a GPU; where nothing can be pinned, ordinary memory,
    with a warning."""
    if device.type == "cuda":
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            warnings.warn(f"No memory can be pinned for copies to {device} ({error}).", stacklevel=2)
    return torch.empty(shape, dtype=dtype)
