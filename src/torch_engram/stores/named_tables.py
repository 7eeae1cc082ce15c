"""Tables in safetensors files by the names of their tensors: which are the rows of which layer, and in what codec.

Two layouts are known by name: DeepSeek-V4.1's, a tensor of FP8 codes and one of scales a layer, and Qwen4Exp's, whose
rows are dealt out to hundreds of tensors in order. Any other matrix may be a table, too: rows of its type, or codes
where a tensor of scales lies beside it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch_engram.config import nearest
from torch_engram.stores.codecs import CODECS, VALUE_CODECS
from torch_engram.stores.tensor_files import DTYPE_NAMES, TensorPlace, tensors_in

_DEEPSEEK = re.compile(r"(?:.*\.)?layers\.(\d+)\.engram\.embed\.weight")
_QWEN = re.compile(r"(?:.*\.)?layers\.(\d+)\.ple\.ple_embedding\.ngram_embedding\.shard_(\d+)\.weight")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\..+")
_SCALE = "scale"


@dataclass(frozen=True)
class NamedTable:
    """One table of rows of ``width`` numbers in a codec."""

    name: str
    """Of its tensor; of many, with ``*`` for their number."""
    layout: str
    """``DeepSeek-V4.1``, ``Qwen4Exp``, or ``plain``."""
    layer: int | None
    codec: str
    width: int
    values: tuple[TensorPlace, ...]
    """Consecutive rows, the first ones first."""
    scales: tuple[TensorPlace, ...] = field(default=())
    """As ``values``; empty where the codec has no scales."""

    @property
    def rows(self) -> int:
        """Rows of all of its tensors."""
        return sum(place.shape[0] for place in self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of its rows."""
        return sum(place.nbytes for place in (*self.values, *self.scales))

    @property
    def files(self) -> tuple[Path, ...]:
        """Where they are."""
        return tuple(dict.fromkeys(place.file for place in (*self.values, *self.scales)))


def find_tables(tensors: Mapping[str, TensorPlace]) -> list[NamedTable]:
    """Every table among ``tensors``: those of known layouts by layer if there are any, otherwise all matrices.

    Raises ``ValueError`` naming the tensor of a known layout that is missing, or has another type or shape than it
    must.
    """
    known = [*_deepseek(tensors), *_qwen(tensors)]
    if known:
        return sorted(known, key=lambda table: (table.layer is None, table.layer))
    return list(_plain(tensors))


def tables_in(path: Path) -> list[NamedTable]:
    """Every table in a file or a folder of shards.

    Raises ``ValueError`` as :func:`tensors_in` and :func:`find_tables` do, or when there is none.
    """
    tables = find_tables(tensors_in(path))
    if not tables:
        raise ValueError(f"{path} has no matrix that could be a table: give the files of the tables.")
    return tables


def table_named(tensors: Mapping[str, TensorPlace], name: str) -> NamedTable:
    """The table of this name: one of :func:`find_tables`, or any other matrix. Raises ``ValueError`` with the nearest
    name when there is none."""
    found = {table.name: table for table in (*_plain(tensors), *find_tables(tensors))}
    if name not in found:
        raise ValueError(f"There is no table {name!r} in these files: {nearest(name, found)}")
    return found[name]


def _deepseek(tensors: Mapping[str, TensorPlace]) -> Iterator[NamedTable]:
    for name, place in tensors.items():
        match = _DEEPSEEK.fullmatch(name)
        if match is None:
            continue
        scale = name.removesuffix("weight") + _SCALE
        if scale not in tensors:
            raise ValueError(f"{place.file} has {name!r} without {scale!r}: give the folder with all shards.")
        codec = _codec(place, tensors[scale])
        if codec != "fp8":
            raise ValueError(
                f"{place.file}: {name!r} {_kind(place)} and its scale {_kind(tensors[scale])} are no FP8 rows with a "
                "scale for 32 numbers: give DeepSeek-V4.1's own shards."
            )
        yield NamedTable(
            name, "DeepSeek-V4.1", int(match[1]), codec, place.shape[1], (place,), (tensors[scale],)
        )  # fmt: skip


def _qwen(tensors: Mapping[str, TensorPlace]) -> Iterator[NamedTable]:
    shards: dict[str, dict[int, TensorPlace]] = defaultdict(dict)
    layers = {}
    for name, place in tensors.items():
        match = _QWEN.fullmatch(name)
        if match is not None:
            table = name[: match.start(2)] + "*" + name[match.end(2) :]
            shards[table][int(match[2])], layers[table] = place, int(match[1])
    for table, found in shards.items():
        missing = next((number for number in range(max(found)) if number not in found), None)
        if missing is not None:
            raise ValueError(f"{table} has no shard {missing}: give the folder with all shards.")
        places = tuple(found[number] for number in range(len(found)))
        codec = _codec(places[0])
        if codec is None:  # such as FP8 with one scale for the whole table
            raise ValueError(
                f"{places[0].file}: {table} is {_kind(places[0])}, which no codec reads: give its shards in BF16, F16 "
                "or F32."
            )
        for place in places:
            if (place.dtype, place.shape[1:]) != (places[0].dtype, places[0].shape[1:]):
                raise ValueError(
                    f"{place.file}: a shard of {table} is {_kind(place)}, and the first one {_kind(places[0])}: give "
                    "the shards of one checkpoint."
                )
        yield NamedTable(table, "Qwen4Exp", layers[table], codec, places[0].shape[1], places)


def _plain(tensors: Mapping[str, TensorPlace]) -> Iterator[NamedTable]:
    beside = {}
    for name, place in tensors.items():
        scale = f"{name.removesuffix('weight').removesuffix('.')}.{_SCALE}"
        if scale in tensors and (codec := _codec(place, tensors[scale])) is not None:
            beside[name] = scale, codec
    scales = {scale for scale, _ in beside.values()}
    for name, place in tensors.items():
        if name in beside:
            scale, codec = beside[name]
            yield NamedTable(name, "plain", _layer(name), codec, place.shape[1], (place,), (tensors[scale],))
        elif name not in scales and (alone := _codec(place)) is not None:
            yield NamedTable(name, "plain", _layer(name), alone, place.shape[1], (place,))


def _layer(name: str) -> int | None:
    match = _LAYER.fullmatch(name)
    return None if match is None else int(match[1])


def _codec(value: TensorPlace, scale: TensorPlace | None = None) -> str | None:
    """The codec whose components have the types and shapes of these tensors; None where there is none."""
    if len(value.shape) != 2:
        return None
    found = [(place.dtype, place.shape) for place in (value, scale) if place is not None]
    for name in VALUE_CODECS:
        parts = CODECS[name].components(value.shape[1])
        wanted = [(DTYPE_NAMES[part.dtype], (value.shape[0], part.width)) for part in parts]
        if wanted == found:
            return name
    return None


def _kind(place: TensorPlace) -> str:
    return f"{place.dtype} {list(place.shape)}"
