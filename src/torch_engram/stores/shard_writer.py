"""One file of tables, written row after row, whose checksum is known when the last row is; a killed one goes on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torch_engram.stores.shards import Piece, Shard
from torch_engram.stores.tensor_files import TensorWriter, encode_header

_RUN = 1 << 22


class Begun(NamedTuple):
    """How far a file has come: its first rows, and what they are."""

    rows: int
    digests: list[str]
    """sha256 of the file up to the last value, then of each other component of the same piece."""


class ShardWriter:
    """Writes the rows of a shard in order, piece by piece, all components of a row at once.

    Components lie one after the other in the file, so each has a checksum of its own until its piece is full; what
    follows the values is then read again, to go into the file's.
    """

    def __init__(self, path: Path, shard: Shard, *, anew: bool):
        self.rows = 0
        """Rows that are written."""
        self._file = open(path, "w+b" if anew else "r+b")  # noqa: SIM115 (closed by close)
        try:
            self._writer = TensorWriter(self._file, shard.tensors)
        except OSError as error:
            self._file.close()
            error.filename = str(path)
            raise
        self._whole = hashlib.sha256(encode_header(shard.tensors))
        self._left = list(shard.pieces)
        self._begin_piece()
        self._leave_full_pieces()

    def take_over(self, begun: Begun, tell: Callable[[int], None]) -> bool:
        """Go on where another one stopped; ``tell`` hears of the bytes that were read for it.

        False when the file does not hold what it wrote: then begin anew.
        """
        while self._left and self.rows < begun.rows:
            piece = self._left[0]
            count = min(begun.rows - self.rows, len(piece.rows) - self._at)
            for name, digest in zip(piece.components, self._digests, strict=True):
                for data in self._stored(piece, name, range(self._at, self._at + count)):
                    digest.update(data)
                    tell(len(data))
            self._advance(count)
        return self.begun() == begun

    def put(self, parts: tuple[Tensor, ...]) -> None:
        """Write the components of the next rows, all of one piece. Raises ``OSError`` when the disk is full."""
        try:
            for name, digest, part in zip(self._left[0].components, self._digests, parts, strict=True):
                rows = part.contiguous()  # they may be views of records
                self._writer.put(name, self._at, rows)
                digest.update(rows.flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            error.filename = self._file.name
            raise
        self._advance(len(parts[0]))

    def begun(self) -> Begun:
        """What :meth:`take_over` wants to know of this file."""
        return Begun(self.rows, [digest.hexdigest() for digest in self._digests])

    def sync(self) -> None:
        """All that was put is on the disk then."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Whatever was put."""
        self._file.close()

    @property
    def sha256(self) -> str:
        """Of the file, when all rows were put."""
        assert not self._left, "rows are missing"
        return self._whole.hexdigest()

    def _advance(self, count: int) -> None:
        self._at += count
        self.rows += count
        self._leave_full_pieces()

    def _leave_full_pieces(self) -> None:
        while self._left and self._at == len(self._left[0].rows):
            piece = self._left.pop(0)
            for name in list(piece.components)[1:]:
                for data in self._stored(piece, name, range(len(piece.rows))):
                    self._whole.update(data)
            self._begin_piece()

    def _begin_piece(self) -> None:
        others = len(self._left[0].components) - 1 if self._left else 0
        self._at, self._digests = 0, [self._whole, *(hashlib.sha256() for _ in range(others))]

    def _stored(self, piece: Piece, name: str, rows: range) -> Iterator[bytes]:
        """Rows of a tensor as they are on the disk, run after run."""
        step = max(1, _RUN // max(1, piece.components[name].nbytes))
        for first in range(rows.start, rows.stop, step):
            yield self._writer.get(name, first, min(step, rows.stop - first))
