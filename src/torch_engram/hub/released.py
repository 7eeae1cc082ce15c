"""Checkpoints under a release's names: their configuration, their few small tensors, and how a folder of one is made.

What two releases share is here; their names and shapes are in the file of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_engram.addressing.layout import layouts
from torch_engram.config import EngramConfig
from torch_engram.durable import write_json
from torch_engram.fusion import Engram
from torch_engram.memory.read_through import ReadThrough
from torch_engram.stores.convert import Conversion, Tell
from torch_engram.stores.shards import Target
from torch_engram.stores.tensor_files import TensorPlace, read_tensor, tensors_in, write_tensors

CONFIG = "config.json"
_WEIGHTS = "engrams.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_TEXT = "text_config"
_SHAPES = ("fusion", "hidden", "branches", "embedding_dim", "conv_kernel", "bias")
"""What an Engram's weights and its arithmetic depend on."""


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json``, and its ``text_config``: the same where that has a level of its own.

    Raises ``ValueError`` when there is none that can be read.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
        text = config.get(_TEXT, config)
        if not isinstance(text, dict):
            raise TypeError(f"{_TEXT} is no object")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give the folder of a whole checkpoint.") from error
    return config, text


def with_text(config: dict[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with these keys in its ``text_config``, or at its top where it has keys but no such level."""
    if config and _TEXT not in config:
        return {**config, **text}
    return {**config, _TEXT: {**config.get(_TEXT, {}), **text}}


def key(text: Mapping[str, Any], name: str, folder: Path) -> Any:
    """A key of ``text_config``. Raises ``ValueError`` when it is missing."""
    if name not in text:
        raise ValueError(f"{folder / CONFIG} has no {name!r}: give the release's own, or one that was written here.")
    return text[name]


def safe_tensors_in(folder: Path) -> dict[str, TensorPlace]:
    """As :func:`tensors_in`; pickled checkpoints are refused by name."""
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = next((path for path in sorted(folder.iterdir()) if path.suffix in _PICKLED), None)
        if pickled is not None:
            raise ValueError(f"{pickled} is pickled, and reading it would run its code: convert it to safetensors.")
    if folder.suffix in _PICKLED:
        raise ValueError(f"{folder} is pickled, and reading it would run its code: convert it to safetensors.")
    return tensors_in(folder)


def take(
    tensors: Mapping[str, TensorPlace],
    prefix: str,
    kinds: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]],
    others: Iterable[str] = (),
) -> dict[str, Tensor]:
    """The tensors under ``prefix``, by the rest of their names; ``kinds``: which types and shape each may have.

    ``others``: what may lie beside them. Raises ``ValueError`` naming the tensor that is missing, too many, or of
    another type or shape.
    """
    found = {}
    for name, (dtypes, shape) in kinds.items():
        place = tensors.get(prefix + name)
        if place is None:
            raise ValueError(f"There is no tensor {prefix + name!r} in these files: give the folder with all shards.")
        if place.dtype not in dtypes or place.shape != shape:
            raise ValueError(
                f"{place.file}: {prefix + name!r} is {place.dtype} {list(place.shape)}, and {CONFIG} asks for "
                f"{' or '.join(dtypes)} {list(shape)}: give the shards and the configuration of one checkpoint."
            )
        found[name] = read_tensor(place)
    known = {prefix + name for name in (*kinds, *others)}
    extra = next((name for name in tensors if name.startswith(prefix) and name not in known), None)
    if extra is not None:
        raise ValueError(
            f"{tensors[extra].file} holds {extra!r}, which this format does not have: give a checkpoint of the release."
        )
    return found


def require_layers(found: Iterable[int], wanted: Iterable[int], folder: Path) -> None:
    """Raises ``ValueError`` unless tables are found for just the layers that are wanted."""
    here, asked = sorted(found), sorted(wanted)
    if here != asked:
        raise ValueError(
            f"{folder} has tables of layers {here}, and its {CONFIG} names layers {asked}: give the folder with all "
            "shards of one checkpoint."
        )


def require_expressible(memory: ReadThrough, fixed: Mapping[str, Any], uniform: Iterable[str], release: str) -> None:
    """Raises ``ValueError`` naming the field of a memory's configuration that ``release`` has no key for."""
    config = memory.config
    for field, value in fixed.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"Memory {memory.name!r} has {field} {getattr(config, field)!r}, and {release} has {value!r} always: "
                f"train one with {field}={value!r}."
            )
    for field in uniform:
        if len(set(config.per_order(field))) > 1:
            raise ValueError(
                f"Memory {memory.name!r} has {field} {getattr(config, field)!r}, and {release} has one for all orders: "
                "train one with a single number."
            )


def require_derived(memory: ReadThrough, release: str) -> None:
    """Raises ``ValueError`` for multipliers or primes that its configuration does not give, as those of ``release``
    do."""
    if dict(memory.layouts) != layouts(memory.config):
        raise ValueError(
            f"Memory {memory.name!r} has other multipliers or primes than its configuration gives, and {release} "
            "derives them from that: its rows would be looked up elsewhere."
        )


def require_engrams(engrams: Mapping[int, Engram], config: EngramConfig) -> None:
    """Raises ``ValueError`` unless there is an Engram like the memory's for every layer, and all numbers are finite."""
    if sorted(engrams) != list(config.layers):
        raise ValueError(
            f"Engrams are given for layers {sorted(engrams)}, and the memory is at {list(config.layers)}: give one for "
            "each layer."
        )
    for layer, engram in engrams.items():
        for field in _SHAPES:
            own, wanted = getattr(engram.config, field), getattr(config, field)
            if own != wanted:
                raise ValueError(
                    f"The Engram of layer {layer} has {field} {own!r}, and the memory {wanted!r}: give the Engrams "
                    "that were trained with it."
                )
        odd = next((name for name, weight in engram.named_parameters() if not weight.isfinite().all()), None)
        if odd is not None:
            raise ValueError(f"The Engram of layer {layer} has NaN or infinity in {odd}: write an earlier state of it.")


def write_folder(
    memory: ReadThrough, folder: Path, target: Target, company: Callable[[Path], None], tell: Tell | None
) -> None:
    """Stream the tables of a memory into ``folder``, beside what ``company`` writes; it appears when it is whole."""
    Conversion(memory.folder, memory.tables, folder, target, company).run(tell or (lambda _: None))


def write_weights(folder: Path, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """The small tensors in one file, and ``config.json``."""
    if tensors:
        write_tensors(folder / _WEIGHTS, tensors)
    write_json(folder / CONFIG, config)
