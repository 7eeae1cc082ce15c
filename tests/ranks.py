"""Real processes with gloo between them, or NCCL, as many as a test wants ranks."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes  # type: ignore[attr-defined]

IMPORTS = "torch._dynamo", "torch_engram.memory", "torch_engram.optim", "torch_engram.train"
"""What most ranks need."""


def run_ranks(
    ranks: int, function: Callable[..., Any], *arguments: Any, device: str = "cpu", imports: Sequence[str] = IMPORTS
) -> list[Any]:
    """What ``function(*arguments)`` returns on every rank, in processes of their own, where torch.distributed is there.

    ``function`` is at the top of its module; on ``cuda`` each rank has a GPU. ``imports``: modules that take long
    and are imported once for all ranks, those of the first call once for all calls. Raises what one of them raised.
    """
    method = "spawn" if device == "cuda" else "forkserver"
    multiprocessing.set_forkserver_preload(list(imports))
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (ranks, Path(folder), device, function, arguments), ranks, start_method=method)
        return [torch.load(_result(Path(folder), rank), weights_only=False) for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, folder: Path, device: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
    )
    torch.save(function(*arguments), _result(folder, rank))
    dist.barrier()
    dist.destroy_process_group()


def _result(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.pt"
