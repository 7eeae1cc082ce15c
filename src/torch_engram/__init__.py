"""torch-engram: conditional memory for language models in PyTorch.

The names below are imported when they are first used, so that ``engram --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_engram.addressing import Addressing, CanonicalVocab
    from torch_engram.config import EngramConfig
    from torch_engram.fusion import Engram
    from torch_engram.memory import (
        DecodeMemory,
        FixedMemory,
        Memory,
        MemoryBank,
        Tokens,
        WorkingSet,
        disk_rows,
        join,
        load_bank,
        open_bank,
        save_bank,
    )
    from torch_engram.models import Decoder, DecoderConfig, MoEConfig
    from torch_engram.optim import RowAdagrad, RowAdam, RowOptimizer, RowSinkhorn, RowwiseAdam

__version__ = "0.1.0"

_ROOMS = {
    "Addressing": "addressing",
    "CanonicalVocab": "addressing",
    "DecodeMemory": "memory",
    "Decoder": "models",
    "DecoderConfig": "models",
    "Engram": "fusion",
    "EngramConfig": "config",
    "FixedMemory": "memory",
    "Memory": "memory",
    "MemoryBank": "memory",
    "MoEConfig": "models",
    "RowAdagrad": "optim",
    "RowAdam": "optim",
    "RowOptimizer": "optim",
    "RowSinkhorn": "optim",
    "RowwiseAdam": "optim",
    "Tokens": "memory",
    "WorkingSet": "memory",
    "disk_rows": "memory",
    "join": "memory",
    "load_bank": "memory",
    "open_bank": "memory",
    "save_bank": "memory",
}

__all__ = [
    "Addressing",
    "CanonicalVocab",
    "DecodeMemory",
    "Decoder",
    "DecoderConfig",
    "Engram",
    "EngramConfig",
    "FixedMemory",
    "Memory",
    "MemoryBank",
    "MoEConfig",
    "RowAdagrad",
    "RowAdam",
    "RowOptimizer",
    "RowSinkhorn",
    "RowwiseAdam",
    "Tokens",
    "WorkingSet",
    "disk_rows",
    "join",
    "load_bank",
    "open_bank",
    "save_bank",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'torch_engram' has no attribute {name!r}")
    return getattr(importlib.import_module(f"torch_engram.{_ROOMS[name]}"), name)
