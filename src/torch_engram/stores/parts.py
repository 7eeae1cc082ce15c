"""A table on disk: immutable safetensors parts, streamed both ways; a later save adds the rows that changed.

A part holds one tensor a component (``value``, ``count``, …), its data begins on a 4 KiB boundary so that it can be
read in place, and its name holds its checksum: no save ever touches an earlier save's parts. Which parts make up the
table is said by a :class:`~torch_engram.stores.manifest.Manifest`, which whoever saves keeps and replaces last.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from torch_engram.durable import file_digest, replacing, sync
from torch_engram.stores.manifest import Manifest, Part, planes_of, tensor_name
from torch_engram.stores.open_files import TensorFile
from torch_engram.stores.records import RecordLayout
from torch_engram.stores.tensor_files import TensorWriter, file_size

ROWS_PER_PART = 1 << 22  # a multiple of 4096, so that every component of a full part is aligned
CHUNK_ROWS = 1 << 16
"""Rows that are in memory at a time."""
ROW_TENSOR = "row"
_PART = re.compile(r"(rows-\d{12,}-\d{12,}|changes)-[0-9a-f]{16}\.safetensors|unnamed-[0-9a-f]{8}(\.[0-9a-f]{8}\.tmp)?")

Read = Callable[[Tensor], Tensor]
"""Row ids int64 ``[n]`` to their records uint8 ``[n, nbytes]``."""
Write = Callable[[Tensor, Tensor], None]
"""Takes row ids and their records."""


def save_table(
    folder: Path, rows: int, layout: RecordLayout, read: Read, rows_per_part: int = ROWS_PER_PART
) -> Manifest:
    """Write a table of ``rows`` rows into ``folder``, beside what is there.

    Memory stays bounded by a chunk of 65,536 rows. Raises ``OSError`` when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        write_rows(folder, first, min(first + rows_per_part, rows), layout, read)
        for first in range(0, rows, rows_per_part)
    ]
    sync(folder)
    return Manifest(rows, planes_of(layout), tuple(parts))


def save_touched(folder: Path, rows: int, touched: Tensor, layout: RecordLayout, read: Read) -> Manifest:
    """As :func:`save_table`, of a table whose rows other than ``touched`` (int64, ascending) are zeros: those are left
    out."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = write_changes(folder, touched, layout, read)
    sync(folder)
    return Manifest(rows, planes_of(layout), tuple(parts), len(touched))


def update_table(folder: Path, earlier: Manifest, changed: Tensor, layout: RecordLayout, read: Read) -> Manifest:
    """Add the rows ``changed`` (int64, ascending) to the saved table ``earlier``, which stays whole.

    A table whose changes would come to more than half of its rows is written anew, as is one of which only touched rows
    were saved. Raises ``OSError`` when the disk is
    full.
    """
    if not takes_changes(folder, earlier, len(changed), layout):
        return save_table(folder, earlier.rows, layout, read)
    parts = write_changes(folder, changed, layout, read)
    sync(folder)
    return replace(earlier, parts=(*earlier.parts, *parts))


def takes_changes(folder: Path, earlier: Manifest, changed: int, layout: RecordLayout) -> bool:
    """Whether so many changed rows are best added to the saved table ``earlier``, which has all its parts there."""
    intact = all(
        _size_on_disk(folder / part.file) == file_size(_tensors(part.rows, layout, part.first is None))
        for part in earlier.parts
    )
    listed = sum(part.rows for part in earlier.changes) + changed
    return earlier.touched is None and intact and earlier.planes == planes_of(layout) and listed <= earlier.rows // 2


def check_table(
    folder: Path, manifest: Manifest, rows: int, layout: RecordLayout, parts: Sequence[Part] | None = None
) -> None:
    """Read a table of ``rows`` rows through without keeping anything; ``layout``'s planes must be among its own.

    ``parts``: those of the table that are read, all by default. Raises ``ValueError`` naming the file that is missing,
    truncated or damaged, or what else does not fit.
    """
    if manifest.rows != rows:
        raise ValueError(
            f"{folder} holds {manifest.rows} rows where {rows} are needed: load it with its own configuration."
        )
    for name, kind in planes_of(layout).items():
        if manifest.planes.get(name) != kind:
            raise ValueError(
                f"{folder} has other planes than this table: load it with its own row optimiser and codec "
                f"({name} is {manifest.planes.get(name, 'absent')}, not {kind})."
            )
    for part in manifest.parts if parts is None else parts:
        _check_sum(folder / part.file, part.sha256)
        file = open_part(folder / part.file, part, layout)
        if part.first is None:
            listed_rows(file, rows)


def load_table(folder: Path, manifest: Manifest, layout: RecordLayout, write: Write) -> None:
    """Hand the records of a table that :func:`check_table` has passed on to ``write``, a changed row more than once;
    planes that ``layout`` lacks stay on disk, and rows that are in no file are left out."""
    for part in manifest.parts:
        _read_part(folder / part.file, part, layout, write)


def parts_in(folder: Path) -> set[Path]:
    """Every file in ``folder`` that is named as a part, whoever names it in a manifest, or that a killed save left of
    one."""
    return {path for path in folder.iterdir() if _PART.fullmatch(path.name) and path.is_file()}


def write_rows(folder: Path, first: int, last: int, layout: RecordLayout, read: Read) -> Part:
    """Write consecutive rows; ``read`` is called once for every :data:`CHUNK_ROWS` of them."""
    return _write_part(folder, first, torch.arange(first, last), layout, read)


def write_changes(folder: Path, changed: Tensor, layout: RecordLayout, read: Read) -> list[Part]:
    """Write rows int64 ascending that list themselves."""
    return [_write_part(folder, None, rows, layout, read) for rows in changed.split(ROWS_PER_PART) if len(rows)]


def _write_part(folder: Path, first: int | None, rows: Tensor, layout: RecordLayout, read: Read) -> Part:
    """Write one safetensors file in one pass over the rows; its checksum is of what the disk then holds."""
    unnamed = folder / f"unnamed-{secrets.token_hex(4)}"  # others may write parts beside this one
    with replacing(unnamed) as file:
        writer = TensorWriter(file, _tensors(len(rows), layout, lists_rows=first is None))
        if first is None:
            writer.put(ROW_TENSOR, 0, rows)
        for start in range(0, len(rows), CHUNK_ROWS):
            records = read(rows[start : start + CHUNK_ROWS]).cpu()
            for field in layout.fields:
                writer.put(tensor_name(field), start, records[:, field.start : field.stop])
    digest = file_digest(unnamed)
    what = "changes" if first is None else f"rows-{first:012d}-{first + len(rows):012d}"
    name = f"{what}-{digest[:16]}.safetensors"
    os.replace(unnamed, folder / name)  # where a file of this name is there already, by the same bytes
    return Part(name, len(rows), digest, first)


def _tensors(rows: int, layout: RecordLayout, lists_rows: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What a part holds."""
    listed: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {ROW_TENSOR: (torch.int64, (rows,))} if lists_rows else {}
    components = {tensor_name(field): field.component for field in layout.fields}
    return listed | {name: (component.dtype, (rows, component.width)) for name, component in components.items()}


def _size_on_disk(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _check_sum(path: Path, expected: str) -> None:
    try:
        found = file_digest(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): the table is incomplete, use an earlier checkpoint."
        ) from error
    if found != expected:
        raise ValueError(f"{path} is truncated or damaged (its checksum differs): use an earlier checkpoint.")


def open_part(path: Path, part: Part, layout: RecordLayout) -> TensorFile:
    """Raises ``ValueError`` unless it has the tensors that a part like this must have."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: use an intact copy of the table.")
    file = TensorFile(path)
    planes = {name: (dtype, (part.rows, width)) for name, (dtype, width) in planes_of(layout).items()}
    rows = {ROW_TENSOR: ("I64", (part.rows,))} if part.first is None else {}
    for name, kind in [*rows.items(), *planes.items()]:
        place = file.tensors.get(name)
        if place is None or (place.dtype, place.shape) != kind:
            raise ValueError(f"{path} is not the part that is listed ({name!r} differs): use an intact copy.")
    return file


def listed_rows(file: TensorFile, rows: int) -> NDArray[np.int64]:
    """The rows that a part of changes lists, int64 ascending; the table has ``rows``. Raises ``ValueError`` where they
    are others."""
    place = file.tensors[ROW_TENSOR]
    raw = np.empty(place.nbytes, np.uint8)
    file.read_into(place.start, raw)
    file.require_unchanged()
    listed = raw.view(np.int64)
    if (np.diff(listed, prepend=-1, append=rows) <= 0).any():
        raise ValueError(f"{file.path} lists rows out of order: use an intact copy.")
    return listed


def _read_part(path: Path, part: Part, layout: RecordLayout, write: Write) -> None:
    with safe_open(path, framework="pt") as file:
        slices = {field: file.get_slice(tensor_name(field)) for field in layout.fields}
        listed = file.get_tensor(ROW_TENSOR) if part.first is None else None
        for start in range(0, part.rows, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, part.rows)
            records = layout.empty(stop - start)
            for field, rows in slices.items():
                layout.view(records, field).copy_(rows[start:stop])
            if listed is None:
                assert part.first is not None
                write(torch.arange(part.first + start, part.first + stop), records)
            else:
                write(listed[start:stop], records)
