"""Tables of random rows for tests and measurements: of any size, at the rate of the disk, the same for the same seed.

Random bits become numbers without arithmetic: signs, fractions and two bits of the exponent are drawn, so that all
numbers are finite and of moderate size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from secrets import token_hex

import numpy as np
import torch
from torch import Tensor

from torch_engram.durable import require_room, sync
from torch_engram.stores.codecs import Component
from torch_engram.stores.layouts import LAYOUTS, components_of, require_codec_of
from torch_engram.stores.tensor_files import TensorWriter, file_size

_CHUNK_ROWS = 1 << 16
_PATTERNS: dict[torch.dtype, tuple[type[np.unsignedinteger], int, int]] = {
    torch.float32: (np.uint32, 0x81FFFFFF, 0x3A000000),
    torch.bfloat16: (np.uint16, 0x81FF, 0x3A00),
    torch.float16: (np.uint16, 0x8FFF, 0x2000),
    torch.float8_e4m3fn: (np.uint8, 0xF7, 0x00),
    torch.float8_e8m0fnu: (np.uint8, 0x03, 0x74),
    torch.int8: (np.uint8, 0xFF, 0x00),
}
"""An unsigned type as wide as a number, which of its bits are drawn, and which others are set."""


def synthesise(
    folder: Path,
    layout: str,
    rows: int,
    width: int,
    codec: str,
    *,
    layer: int = 1,
    shards: int = 1,
    seed: int = 0,
    tell: Callable[[int], None] | None = None,
) -> None:
    """Write a table of random rows into ``folder``, which must not exist; ``tell`` hears of rows that were written.

    Its ``shards`` are files of consecutive rows each. Memory stays bounded by a chunk of 65,536 rows. The folder is
    there only when it is whole. Raises ``ValueError`` naming what does not fit, and ``OSError`` when the disk is full.
    """
    require_fitting(folder, layout, rows, codec, shards)
    bounds = [rows * shard // shards for shard in range(shards + 1)]
    with _appearing(folder) as beside:
        for shard, (first, last) in enumerate(pairwise(bounds)):
            name = LAYOUTS[layout].names.format(layer=layer, shard=shard)
            components = components_of(name, codec, width)
            _write_shard(beside / f"table-{shard:05d}.safetensors", components, range(first, last), seed, tell)


def require_fitting(folder: Path, layout: str, rows: int, codec: str, shards: int) -> None:
    """Raises ``ValueError`` for what :func:`synthesise` cannot make."""
    require_codec_of(layout, codec)
    if folder.exists():
        raise ValueError(f"{folder} is there already: give another folder.")
    if not 1 <= shards <= rows:
        raise ValueError(f"{rows:,} rows do not come in {shards:,} shards: give 1 to as many as there are rows.")
    if shards > 1 and not LAYOUTS[layout].many:
        raise ValueError(
            f"{layout} has one tensor a table, not {shards}: leave out --shards, or use --layout qwen4exp."
        )


def random_component(part: Component, rows: range, seed: int) -> Tensor:
    """One component of consecutive rows, all of one chunk: ``[len(rows), part.width]``."""
    kind, drawn, fixed = _PATTERNS[part.dtype]
    if part.name == "scale":
        drawn &= ~(1 << 31)  # a scale has no sign
    count = rows.start % _CHUNK_ROWS + len(rows)
    source = np.random.Generator(np.random.SFC64([seed, rows.start // _CHUNK_ROWS, len(part.name)]))
    bits = source.integers(0, 1 << 64, -(-count * part.nbytes // 8), dtype=np.uint64).view(kind)
    bits = bits[: count * part.width].reshape(count, part.width)[count - len(rows) :]
    return torch.from_numpy((bits & kind(drawn)) | kind(fixed)).view(part.dtype)


def _write_shard(
    file: Path, components: dict[str, Component], rows: range, seed: int, tell: Callable[[int], None] | None
) -> None:
    tensors = {name: (part.dtype, (len(rows), part.width)) for name, part in components.items()}
    require_room(file.parent, file_size(tensors), file.name)
    with open(file, "wb") as opened:
        writer = TensorWriter(opened, tensors)
        first = rows.start
        while first < rows.stop:
            chunk = range(first, min(rows.stop, (first // _CHUNK_ROWS + 1) * _CHUNK_ROWS))
            for name, part in components.items():
                writer.put(name, first - rows.start, random_component(part, chunk, seed))
            if tell is not None:
                tell(len(chunk))
            first = chunk.stop
    sync(file)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that gets its name when the block ends, and is gone when the block raises."""
    beside = folder.with_name(f"{folder.name}.{token_hex(4)}.tmp")
    beside.mkdir(parents=True)
    try:
        yield beside
        sync(beside)
        beside.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
