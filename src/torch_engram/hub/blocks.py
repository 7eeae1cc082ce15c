"""The decoder blocks of a causal model of transformers, found by what they are and not by the model's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Blocks:
    """The list of a model's decoder blocks, and the module that calls them one after the other."""

    path: str
    """Of the list within the model."""
    owner: nn.Module
    """Whose forward is given token ids."""
    all: nn.ModuleList
    hidden: int
    """Width d of one residual branch."""
    branches: int
    """M: residual branches (hyper-connections); 1 without."""


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """The decoder blocks of ``model``: the module list at ``path``, or the only one that is as long as its
    configuration has layers.

    Raises ``ValueError`` where there is none such, or more than one, naming those there are.
    """
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    config = _text_config(model)
    if path is None:
        layers = getattr(config, "num_hidden_layers", None)
        fitting = [name for name, part in lists.items() if len(part) == layers and _is_outermost(name, lists)]
        if len(fitting) != 1:
            found = ", ".join(map(repr, fitting or lists)) or "none"
            raise ValueError(
                f"{type(model).__name__} has no one list of decoder blocks (lists: {found}): pass its path as blocks=."
            )
        (path,) = fitting
    elif path not in lists:
        known = ", ".join(map(repr, lists)) or "none"
        raise ValueError(f"{type(model).__name__} has no module list {path!r}: its lists are {known}.")
    owner = model.get_submodule(path.rpartition(".")[0])
    own: Any = getattr(owner, "config", config)
    return Blocks(path, owner, lists[path], own.hidden_size, getattr(own, "hc_mult", None) or 1)


def _text_config(model: nn.Module) -> Any:
    """Of the decoder, where the model is of text and images."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _is_outermost(name: str, lists: dict[str, nn.ModuleList]) -> bool:
    """Whether it lies in no block of another list."""
    return not any(name.startswith(f"{other}.") for other in lists)
