"""``--set key=value``: a recipe with some of its fields changed, by dotted name and read as their declared types."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from torch_engram.config import nearest
from torch_engram.train.recipe import Recipe


def change(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """``recipe`` with ``key=value`` settings laid over it, keys by dotted name (``model.hidden=256``).

    An Engram's hidden width and branches follow the model's, and widths that the model derived are derived again.
    Raises ``ValueError`` naming an unknown key and the nearest one, or a value of the wrong kind.
    """
    fields = recipe.to_dict()
    model = fields["model"]
    if model["kv_heads"] == model["heads"]:
        model["kv_heads"] = None
    if model["head_dim"] == model["hidden"] // model["heads"]:
        model["head_dim"] = None
    for engram in model["engrams"].values():
        del engram["hidden"], engram["branches"]
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ValueError(f"--set {setting!r} has no '=': write key=value, such as steps=200.")
        if key not in _names(fields):
            raise ValueError(f"There is no setting {key!r}: {_nearest_name(key, fields)}")
        _put(fields, Recipe, key, text)
    for engram in model["engrams"].values():
        engram["hidden"], engram["branches"] = model["hidden"], model["branches"]
    return Recipe.from_dict(fields)


def _names(fields: Mapping[str, Any], group: str = "") -> list[str]:
    """The dotted names of all fields, groups of them included."""
    names = []
    for name, value in fields.items():
        names.append(group + name)
        if isinstance(value, dict):
            names += _names(value, f"{group}{name}.")
    return names


def _nearest_name(key: str, fields: Mapping[str, Any]) -> str:
    """The end of a sentence about an unknown ``key``."""
    names = _names(fields)
    absent = next((name for name in names if key.startswith(f"{name}.") and _at(fields, name) is None), None)
    if absent is not None:
        return f"this recipe has no {absent}; use one that has, or a recipe of your own (engram recipes lists them)."
    last = key.rpartition(".")[2]
    alike = [name for name in names if name.endswith(f".{last}")] or difflib.get_close_matches(key, names, n=1)
    return nearest(key, alike or fields)


def _at(fields: Mapping[str, Any], key: str) -> Any:
    return functools.reduce(lambda group, name: group[name], key.split("."), fields)


def _put(fields: dict[str, Any], kind: Any, key: str, text: str) -> None:
    """Set the known field ``key`` below ``fields``, which are those of the type ``kind``."""
    *groups, last = key.split(".")
    for name in groups:
        fields, kind = fields[name], _member(kind, name)
    kind = _member(kind, last)
    if isinstance(fields[last], dict):
        raise ValueError(
            f"{key} is a group of settings: set one of them, such as {key}.{next(iter(fields[last]), 'name')}=…"
        )
    fields[last] = _read(key, text, kind)


def _member(kind: Any, name: str) -> Any:
    """The declared type of a field of a dataclass, or of a value of a ``dict[str, …]``."""
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    owner = next(part for part in get_args(kind) or (kind,) if dataclasses.is_dataclass(part))
    return get_type_hints(owner)[name]


_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    NoneType: ({"none": None, "null": None}.__getitem__, "none"),
    bool: ({"true": True, "false": False}.__getitem__, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    tuple: (lambda text: [int(part) for part in text.strip("[]()").split(",")], "whole numbers such as 1,3"),
    str: (str, "text"),
}
"""How a setting's text becomes a value of each type, tried in this order, and what to call such a value."""


def _read(key: str, text: str, kind: Any) -> Any:
    """``text`` as a value of the type ``kind``, such as ``int | tuple[int, ...]``."""
    allowed = {get_origin(part) or part for part in (get_args(kind) if isinstance(kind, UnionType) else (kind,))}
    readers = {part: reader for part, reader in _READERS.items() if part in allowed}
    for part, (read, _) in readers.items():
        with contextlib.suppress(ValueError, KeyError):
            return read(text.lower() if part in (NoneType, bool) else text)
    raise ValueError(f"{key} is {text!r}: it must be {' or '.join(words for _, words in readers.values())}.")
