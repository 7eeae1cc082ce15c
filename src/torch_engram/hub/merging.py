"""One memory out of several that were trained apart from it: their rows, and only if asked their modules."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from torch_engram.hub.attached import Attached
from torch_engram.hub.saved import read_facts, read_modules, require_alike
from torch_engram.memory.merging import Merging


def merge_memories(
    memory: Attached, *folders: str | os.PathLike[str], rule: str = "mean", average_modules: bool = False
) -> None:
    """Bring into an attached memory what others, which were trained from it, have learned; ``folders``: where
    :func:`save_memory` has put each.

    A row that one of them has updated becomes what it is there, its optimiser's state included. To the value of a row
    that several have updated the mean of their changes is added, each weighted by how often that memory updated it, or
    with ``rule="sum"`` their sum; its count and its optimiser's state are those of the memory that did so most often.

    Rows mean something only to the modules that they were trained with. So all must have this memory's own, as they
    have where only rows were trained, after ``memory.engrams.requires_grad_(False)``; with ``average_modules`` it gets
    the mean of theirs, which is nobody's: measure what comes out. Rows come from the files a window at a time. Raises
    ``ValueError``, with nothing changed, naming the folder that is damaged, is of another configuration, codec or
    tokenizer, has other modules, or was not trained from this memory as it is.
    """
    if not folders:
        raise ValueError("merge_memories() got no folder: name one or more that save_memory() has written.")
    found = [(Path(folder), read_facts(Path(folder))) for folder in folders]
    merging = Merging(memory.bank, [folder / saved["rows"] for folder, saved in found], rule)
    modules = {folder / saved["modules"]: read_modules(folder / saved["modules"]) for folder, saved in found}
    for path, weights in modules.items():
        require_alike(memory, weights, path)
        if not average_modules:
            _require_same(memory, weights, path)
    merging.apply()
    if average_modules:
        memory.engrams.load_state_dict(_mean(list(modules.values())))


def _require_same(memory: Attached, weights: dict[str, Tensor], path: Path) -> None:
    for name, own in memory.engrams.state_dict().items():
        if not torch.equal(weights[name].to(own), own):
            raise ValueError(
                f"{path} has other modules than memory {memory.name!r} (see its tensor {name!r}), and rows mean "
                "nothing to others than they were trained with: train rows alone, after "
                "memory.engrams.requires_grad_(False), or give average_modules=True and measure what comes out."
            )


def _mean(modules: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([weights[name].float() for weights in modules]).mean(0) for name in modules[0]}
