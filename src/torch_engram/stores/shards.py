"""Which rows of which tables go into which file, and what their tensors are called there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch_engram.stores.codecs import Component
from torch_engram.stores.layouts import LAYOUTS, components_of, known_layout, require_codec_of
from torch_engram.stores.row_sources import RowSource
from torch_engram.stores.tensor_files import Tensors, file_size

_MOST = 99_999
"""Files: their names have five digits."""


@dataclass(frozen=True)
class Target:
    """How tables are to be written; :meth:`settled` fills in what was left to them."""

    layout: str | None = None
    codec: str | None = None
    shards: int | None = None
    """Files; one without a ``shard_size``."""
    shard_size: int | None = None
    """The most bytes of a file."""
    layer: int | None = None
    """Of a table that says none."""
    prefix: str | None = None
    """What stands before ``layers.`` in the names of tensors, where it is not as the layout has it."""
    stem: str = "model"
    """What files are called, before their numbers."""

    def settled(self, sources: Sequence[RowSource]) -> tuple[str, list[str]]:
        """The layout, and the codec of each table: those that the tables have, and otherwise the layout's usual one.

        Raises ``ValueError`` for a layout or codec that is none, or that do not go together.
        """
        layouts = sorted({source.layout for source in sources})
        if self.layout is None and len(layouts) > 1:
            raise ValueError(f"There are tables of {' and '.join(layouts)}: say which --layout they are to have.")
        layout = layouts[0] if self.layout is None else self.layout
        allowed = known_layout(layout).codecs
        codecs = [self.codec or (source.codec if source.codec in allowed else allowed[0]) for source in sources]
        for codec in codecs:
            require_codec_of(layout, codec)
        return layout, codecs


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one table."""

    source: RowSource
    rows: range
    codec: str
    components: Mapping[str, Component]
    """Of a row, by the tensor that each becomes."""

    @property
    def tensors(self) -> Tensors:
        """As its file has them."""
        return {name: (part.dtype, (len(self.rows), part.width)) for name, part in self.components.items()}

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row, as written."""
        return sum(part.nbytes for part in self.components.values())


@dataclass(frozen=True)
class Shard:
    """One file."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def tensors(self) -> Tensors:
        """In the order of their bytes."""
        return {name: kind for piece in self.pieces for name, kind in piece.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Of its rows."""
        return sum(len(piece.rows) * piece.row_nbytes for piece in self.pieces)


def deal(sources: Sequence[RowSource], target: Target) -> list[Shard]:
    """The files that ``sources`` become. Where the layout has one tensor a table, tables stay whole; otherwise each is
    dealt out to all files evenly.

    Raises ``ValueError`` naming what does not go together: layout, codec, layers, the number or the size of files.
    """
    layout, codecs = target.settled(sources)
    if target.shards is not None and target.shard_size is not None:
        raise ValueError("--shards and --shard-size both say how many files there are: leave one of them out.")
    names = [_name(source, layout, target, len(sources)) for source in sources]
    whole = [
        Piece(source, range(source.rows), codec, components_of(name, codec, source.width))
        for source, codec, name in zip(sources, codecs, names, strict=True)
    ]
    _require_distinct(whole)
    groups = (_dealt_out if LAYOUTS[layout].many else _kept_whole)(whole, target)
    if len(groups) == 1:
        return [Shard(f"{target.stem}.safetensors", groups[0])]
    return [
        Shard(f"{target.stem}-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def _name(source: RowSource, layout: str, target: Target, tables: int) -> str:
    """With ``{shard}``, where there are many."""
    names = LAYOUTS[layout].names
    if layout == "plain":
        return source.name
    layer = source.layer
    if target.layer is not None:
        if tables > 1:
            raise ValueError(f"--layer is for one table, and there are {tables}: leave it out.")
        layer = target.layer
    if layer is None:
        raise ValueError(f"{source.name!r} says no layer, and {layout} names tables by theirs: give --layer.")
    if target.prefix is not None:
        names = target.prefix + names[names.index("layers.") :]
    return names.replace("{layer}", str(layer))


def _require_distinct(pieces: Sequence[Piece]) -> None:
    seen: dict[str, str] = {}
    for piece in pieces:
        for name in piece.components:
            if name in seen:
                raise ValueError(
                    f"{seen[name]} and {piece.source.name} would both be {name!r}: convert their files apart, or use "
                    "--layout plain."
                )
            seen[name] = piece.source.name


def _kept_whole(whole: Sequence[Piece], target: Target) -> list[tuple[Piece, ...]]:
    if target.shard_size is not None:
        return list(_packed(whole, target.shard_size))
    count = target.shards or 1
    if not 1 <= count <= len(whole):
        raise ValueError(
            f"{len(whole)} tables of one tensor each do not come in {count:,} files: give fewer --shards, or use "
            "--layout qwen4exp."
        )
    bounds = [len(whole) * number // count for number in range(count + 1)]
    return [tuple(whole[first:last]) for first, last in pairwise(bounds)]


def _packed(whole: Sequence[Piece], limit: int) -> Iterator[tuple[Piece, ...]]:
    """As many tables a file as go into one, in order."""
    group: tuple[Piece, ...] = ()
    for piece in whole:
        alone = file_size(piece.tensors)
        if alone > limit:
            raise ValueError(
                f"{next(iter(piece.components))!r} is one tensor in this layout, of {alone:,} bytes: give a larger "
                "--shard-size, or use --layout qwen4exp."
            )
        if group and file_size(Shard("", (*group, piece)).tensors) > limit:
            yield group
            group = ()
        group = *group, piece
    yield group


def _dealt_out(whole: Sequence[Piece], target: Target) -> list[tuple[Piece, ...]]:
    most = min(_MOST, *(len(piece.rows) for piece in whole))
    count = target.shards or 1
    if target.shard_size is not None:
        count = _fewest(whole, target.shard_size, most)
    if not 1 <= count <= most:
        raise ValueError(f"These rows do not come in {count:,} files: give 1 to {most:,} --shards.")
    return [_share(whole, number, count) for number in range(count)]


def _fewest(whole: Sequence[Piece], limit: int, most: int) -> int:
    """Files that keep to the limit."""
    low, high = 1, most + 1
    while low < high:  # the first file of so many that none is larger
        count = (low + high) // 2
        if count <= most and _largest(whole, count) > limit:
            low = count + 1
        else:
            high = count
    if low > most:
        raise ValueError(f"No {most:,} files of {limit:,} bytes hold these rows: give a larger --shard-size.")
    return low


def _largest(whole: Sequence[Piece], count: int) -> int:
    """Bytes of a file with the most rows of every table; all headers are as long as the last file's."""
    last = _share(whole, count - 1, count)
    most = [replace(share, rows=range(-(-len(piece.rows) // count))) for piece, share in zip(whole, last, strict=True)]
    return file_size(Shard("", tuple(most)).tensors)


def _share(whole: Sequence[Piece], number: int, count: int) -> tuple[Piece, ...]:
    """Of every table its rows in file ``number``."""
    return tuple(
        replace(
            piece,
            rows=range(len(piece.rows) * number // count, len(piece.rows) * (number + 1) // count),
            components={name.replace("{shard}", str(number)): part for name, part in piece.components.items()},
        )
        for piece in whole
    )
