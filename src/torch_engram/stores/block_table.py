"""Packed records in the blocks of a working file: gathered from blocks in memory, and scattered into them.

A record may lie in one block or go on in the next ones. Those that lie in one are copied as a whole, the others word by
word; records are whole words of 8 bytes, and so no word lies in two blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_engram.free_memory import free_memory
from torch_engram.stores.block_cache import BlockCache
from torch_engram.stores.block_reads import BLOCK
from torch_engram.stores.records import RecordLayout
from torch_engram.stores.row_index import RowIndex
from torch_engram.stores.row_reads import Bytes, Int64s, in_parts
from torch_engram.stores.working_file import WorkingFile

_WORD = 8
_WORDS = BLOCK // _WORD
_PIECE = 1 << 16
"""Rows that one thread asks for at a time, at most."""
_THREADS = 4
_LEAST = 64
"""Blocks of the cache, at least."""
_SHARE = 4
"""Of the cache a piece takes no more than one part of so many, so that several are under way."""
_FREE_SHARE = 8
"""Of the memory that is free the cache takes no more than one part of so many, by default."""


@dataclass(frozen=True)
class _Places:
    """Where ``n`` records are in memory, by word of the cache."""

    whole: Int64s
    """Which of them lie in one block."""
    starts: Int64s
    """The first word of each of those."""
    cut: Int64s
    """Which do not."""
    words: Int64s
    """All words of each of those, ``[cut, words of a record]``."""


class BlockTable(RowIndex):
    """Records of every row of ``spaces`` (space → rows), zeroed, in the file ``path``.

    ``staging``: bytes of memory for blocks that were used lately, at most; by default an eighth of what is free. Beside
    them a row costs a byte and a block four. Raises what :class:`~torch_engram.stores.working_file.WorkingFile` does.
    """

    def __init__(self, layout: RecordLayout, spaces: Mapping[int, int], path: Path, staging: int | None = None):
        super().__init__(layout, spaces, torch.device("cpu"))
        tensors = {f"rows.{space}": (torch.uint8, (rows, layout.nbytes)) for space, rows in spaces.items()}
        rest = -sum(rows * layout.nbytes for rows in spaces.values()) % BLOCK
        self.file = WorkingFile(path, {**tensors, "unused": (torch.uint8, (rest,))})
        self._words = layout.nbytes // _WORD
        self._most = (self._words - 2) // _WORDS + 2 if self._words > 1 else 1  # blocks of a record
        budget = (free_memory() or 0) // _FREE_SHARE if staging is None else staging
        slots = max(min(budget // BLOCK, self.file.blocks + 1), _LEAST, _SHARE * self._most + 1)
        self.cache = BlockCache(self.file, slots)
        fits = self.file.blocks <= slots // _SHARE  # whatever rows a piece has
        self._piece = _PIECE if fits else min(_PIECE, slots // (_SHARE * self._most))
        self._flat = self.cache.memory.view(np.int64)
        self._record = np.dtype((np.void, layout.nbytes))
        self._anywhere = np.ndarray(
            (len(self._flat) - self._words + 1,), self._record, self.cache.memory, strides=(_WORD,)
        )  # a record that begins at any word of the cache
        self._gatherers, self._scatterers = (
            ThreadPoolExecutor(_THREADS, thread_name_prefix=f"engram-disk-{what}") for what in ("fetch", "write")
        )

    def gather(self, keys: Tensor, out: Tensor) -> None:
        """Fill ``out`` uint8 ``[U, nbytes]`` with the records of ``keys`` ``[U]``, both on the CPU. Raises
        ``ValueError`` naming a row or a space that is not there, ``OSError`` naming the file that cannot be read."""
        index, records = self.checked_index(keys).numpy(), out.numpy()
        in_parts(self._gatherers, len(index), self._piece, lambda part: self._gather(index[part], records[part]))

    def scatter(self, keys: Tensor, records: Tensor) -> None:
        """Replace the records of distinct keys. Raises as :meth:`gather` does, and ``OSError`` when an earlier one
        could not be written to the file."""
        index, given = self.checked_index(keys).numpy(), np.ascontiguousarray(records.numpy())
        in_parts(self._scatterers, len(index), self._piece, lambda part: self._scatter(index[part], given[part]))
        self._changed.numpy()[index] = 1

    def _gather(self, index: Int64s, out: Bytes) -> None:
        blocks, places = self._blocks_of(index)
        slots = self.cache.hold(blocks, to_write=False)
        try:
            found = self._places(index, slots[places])
            out.view(self._record)[found.whole, 0] = self._anywhere[found.starts]
            out.view(np.int64)[found.cut] = self._flat[found.words]
        finally:
            self.cache.release(slots)

    def _scatter(self, index: Int64s, records: Bytes) -> None:
        self.cache.require_sound()
        blocks, places = self._blocks_of(index)
        slots = self.cache.hold(blocks, to_write=True)
        try:
            found = self._places(index, slots[places])
            self._anywhere[found.starts] = records.view(self._record)[found.whole, 0]
            self._flat[found.words] = records.view(np.int64)[found.cut]
        finally:
            self.cache.release(slots, written=True)

    def _blocks_of(self, index: Int64s) -> tuple[Int64s, NDArray[np.intp]]:
        """The distinct blocks that records lie in, ascending, and which of them are those of each record, ``[n, most
        blocks of a record]``."""
        first = index * self._words
        last = (first + self._words - 1) // _WORDS
        blocks = np.minimum((first // _WORDS)[:, None] + np.arange(self._most), last[:, None]).reshape(-1)
        is_new = np.append(True, blocks[1:] != blocks[:-1])
        if (blocks[1:] >= blocks[:-1]).all():
            distinct, places = blocks[is_new], is_new.cumsum() - 1
        else:
            distinct, places = np.unique(blocks, return_inverse=True)
        return distinct, places.reshape(-1, self._most)

    def _places(self, index: Int64s, slots: Int64s) -> _Places:
        """``slots``: of the blocks of each record."""
        within = index * self._words % _WORDS
        is_cut = within + self._words > _WORDS
        whole, cut = (~is_cut).nonzero()[0], is_cut.nonzero()[0]
        words = within[cut, None] + np.arange(self._words)  # counted from the first block's beginning
        words = np.take_along_axis(slots[cut], words // _WORDS, 1) * _WORDS + words % _WORDS
        return _Places(whole, slots[whole, 0] * _WORDS + within[whole], cut, words)
