"""Records out of a table and back into it on a GPU: the Triton twins of :meth:`RecordTable.gather` and ``scatter``.

A record is a few 8-byte words. Words are numbered through over all wanted rows, so that no lane idles whatever a
record's length, and neighbouring lanes touch neighbouring words. Word numbers are int64: a table has more than 2**31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.stores.records import ROW_MASK, SPACE_SHIFT

_WORDS = 1024
"""Words that one program moves: 8 a thread."""
_MASK, _SHIFT = tl.constexpr(ROW_MASK), tl.constexpr(SPACE_SHIFT)


def gather_triton(table: Tensor, bases: Tensor, keys: Tensor) -> Tensor:
    """Words int64 ``[U, w]`` of keys ``[U]`` from ``table`` ``[rows, w]``; ``bases``: where each space begins in it.

    The table may also be host memory that is pinned: its rows then cross the bus as they are read.
    """
    records = torch.empty((len(keys), table.shape[1]), dtype=torch.int64, device=keys.device)
    if len(keys):
        _gather[(triton.cdiv(records.numel(), _WORDS),)](
            table, bases, keys, records, records.numel(), WIDTH=table.shape[1], WORDS=_WORDS
        )
    return records


def scatter_triton(
    table: Tensor, bases: Tensor, keys: Tensor, records: Tensor, changed: Tensor, programs: int | None = None
) -> None:
    """Replace the words of distinct keys by ``records`` int64 ``[U, w]``, and mark their rows in ``changed`` uint8.

    ``table`` and ``changed`` may also be host memory that the GPU reaches; ``programs``, by default as many as there is
    work for, are then few.
    """
    if len(keys):
        most = triton.cdiv(records.numel(), _WORDS)
        programs = most if programs is None else min(programs, most)
        _scatter[(programs,)](
            table, bases, keys, records, changed, records.numel(), programs, WIDTH=table.shape[1], WORDS=_WORDS
        )


@triton.jit
def _place(bases, keys, begin, words, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    """Some words' numbers among the wanted ones, which are there, their rows in the table and places in the row."""
    number = begin + tl.arange(0, WORDS)
    here = number < words
    key = tl.load(keys + number // WIDTH, mask=here, other=0)
    row = tl.load(bases + (key >> _SHIFT), mask=here, other=0) + (key & _MASK)
    return number, here, row, number % WIDTH


@triton.jit
def _gather(table, bases, keys, records, words, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * WORDS
    number, here, row, word = _place(bases, keys, begin, words, WIDTH, WORDS)
    tl.store(records + number, tl.load(table + row * WIDTH + word, mask=here), mask=here)


@triton.jit(do_not_specialize=("programs",))
def _scatter(table, bases, keys, records, changed, words, programs, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    for begin in range(tl.program_id(0).to(tl.int64) * WORDS, words, programs * WORDS):
        number, here, row, word = _place(bases, keys, begin, words, WIDTH, WORDS)
        tl.store(table + row * WIDTH + word, tl.load(records + number, mask=here), mask=here)
        tl.store(changed + row, tl.full([WORDS], 1, tl.uint8), mask=here & (word == 0))
