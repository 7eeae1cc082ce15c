"""Safetensors files by byte: where their tensors lie, so that rows are read in place, and how they are streamed.

Data that is written here begins on a 4 KiB boundary, as direct reads want it. The library checks headers; what it does
not tell is where in its file a tensor lies.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

ALIGNMENT = 4096
DTYPE_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32", torch.int64: "I64",
    torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
"""As safetensors calls them."""
Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Types and shapes of tensors that follow each other in a file, by name."""


@dataclass(frozen=True)
class TensorPlace:
    """One tensor in one file."""

    file: Path
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""
    nbytes: int

    @property
    def stop(self) -> int:
        """The byte after its last."""
        return self.start + self.nbytes


def read_header(file: Path) -> dict[str, TensorPlace]:
    """The tensors of one file by name, in the order of their bytes.

    Raises ``ValueError`` naming the file when it is truncated, or its header is none: too long, no UTF-8, tensors
    that overlap, leave gaps or do not have the size that their shape says. Raises ``OSError`` when it cannot be read.
    """
    if not file.is_file():
        what = "is a link to nothing: fetch it again" if file.is_symlink() else "is no file: give a .safetensors file"
        raise ValueError(f"{file} {what}, or give a folder of shards.")
    with open(file, "rb"):  # what hinders that is said here: the library calls it a file that is not there
        pass
    try:
        with safe_open(file, framework="numpy"):  # it maps the file read-only, and loads nothing
            pass
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            entries = json.loads(opened.read(length))
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({str(error).strip()}): fetch or write it again."
        ) from error
    entries.pop("__metadata__", None)
    begin = 8 + length
    places = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        places[name] = TensorPlace(file, entry["dtype"], tuple(entry["shape"]), begin + start, stop - start)
    return places


def tensors_in(path: Path) -> dict[str, TensorPlace]:
    """The tensors of a file, or of a folder: of the shards that its index names, or of all that lie in it.

    Raises ``ValueError`` naming the shard as :func:`read_header` does, or when an index names a shard or a tensor that
    is not there, two shards hold one tensor, there is none at all, or a folder has more than one index.
    """
    found = _in_folder(path) if path.is_dir() else read_header(path)
    if not found:
        raise ValueError(f"{path} has no tensor: give the files of a checkpoint.")
    return found


def _in_folder(path: Path) -> dict[str, TensorPlace]:
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(
            f"{path} has {len(indices)} indices ({indices[0].name}, …): give the shards of one checkpoint."
        )
    return _by_index(indices[0]) if indices else _all_in(path)


def _all_in(folder: Path) -> dict[str, TensorPlace]:
    files = sorted(file for file in folder.glob("*.safetensors") if not file.is_dir())
    if not files:
        raise ValueError(f"{folder} has no .safetensors file: give the file, or the folder that holds the shards.")
    found: dict[str, TensorPlace] = {}
    for file in files:
        for name, place in read_header(file).items():
            if name in found:
                raise ValueError(
                    f"{found[name].file} and {file} both hold {name!r}: keep the shards of one checkpoint."
                )
            found[name] = place
    return found


def _by_index(index: Path) -> dict[str, TensorPlace]:
    try:
        named = dict(json.loads(index.read_bytes())["weight_map"])
        shards = {shard: index.parent / shard for shard in sorted(set(named.values()))}
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of safetensors shards ({error!r}): fetch or write it again.") from error
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is not in its folder: fetch or write it again.")
    headers = {shard: read_header(file) for shard, file in shards.items()}
    for name, shard in named.items():
        if name not in headers[shard]:
            raise ValueError(f"{shards[shard]} has no {name!r}, which {index.name} says it has: fetch it again.")
    return {name: headers[shard][name] for name, shard in named.items()}


def read_tensor(place: TensorPlace) -> Tensor:
    """One tensor, on the CPU, as its file has it. Raises ``ValueError`` for a type that none of ours is."""
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    if place.dtype not in dtypes:
        raise ValueError(f"{place.file} has a tensor of {place.dtype}, which nothing here reads: give another file.")
    raw = np.fromfile(place.file, np.uint8, place.nbytes, offset=place.start)
    return torch.from_numpy(raw).view(dtypes[place.dtype]).view(place.shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors to a new file, synced. Raises ``OSError`` when the disk is full."""
    with open(path, "wb") as file:
        writer = TensorWriter(file, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            writer.put(name, 0, tensor.detach().cpu())
        os.fsync(file.fileno())


class TensorWriter:
    """Streams tensors into one file, rows in any order; the header, written at once, says all of them.

    Into a file that has them already, it writes the same header, and other rows stay.
    """

    def __init__(self, file: BinaryIO, tensors: Tensors):
        header = encode_header(tensors)
        file.write(header)
        file.flush()
        self._descriptor, self._places, at = file.fileno(), {}, len(header)
        for name, (dtype, shape) in tensors.items():
            self._places[name] = at, nbytes(dtype, shape[1:])
            at += nbytes(dtype, shape)

    def put(self, name: str, first: int, rows: Tensor) -> None:
        """Write rows of a tensor, from row ``first`` on. Raises ``OSError`` when the disk is full."""
        start, row = self._places[name]
        view, at = rows.contiguous().flatten().view(torch.uint8).numpy().data, start + first * row
        while view:  # pwrite may write less than it was given
            done = os.pwrite(self._descriptor, view, at)
            view, at = view[done:], at + done

    def get(self, name: str, first: int, rows: int) -> bytes:
        """The bytes of rows that were put into a file that can be read, too; fewer where it ends before."""
        start, row = self._places[name]
        return os.pread(self._descriptor, rows * row, start + first * row)


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def file_size(tensors: Tensors) -> int:
    """Bytes of a file that :class:`TensorWriter` has filled."""
    return len(encode_header(tensors)) + sum(nbytes(*kind) for kind in tensors.values())


def encode_header(tensors: Tensors) -> bytes:
    """Length and JSON header, padded with spaces up to the boundary."""
    entries, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = nbytes(dtype, shape)
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    length = -(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)
