"""What a GPU does for an ask of a table in host memory: the Triton twins of :mod:`torch_engram.stores.host_asks`.

Both take as many keys as there is room for and look up in the device's memory how many of them are meant, so that they
can be captured. Offsets are int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.stores.host_asks import SHARES
from torch_engram.stores.records import ROW_MASK, SPACE_SHIFT

_KEYS = 1024
"""Keys that one program sends."""
_PROGRAMS, _ROWS = 256, 4
"""Programs that read rows, and rows that each reads together: the bus has all it can take under way with fewer."""
_SHARES = tl.constexpr(SHARES)
_MASK, _SHIFT = tl.constexpr(ROW_MASK), tl.constexpr(SPACE_SHIFT)


def send_triton(keys: Tensor, count: Tensor, bases: Tensor, rows: Tensor, index: Tensor, head: Tensor) -> None:
    """See :func:`torch_engram.stores.host_asks.send_naive`; ``index`` and ``head`` are pinned."""
    _send[(max(1, triton.cdiv(len(keys), _KEYS)),)](
        keys, count, bases, rows, index, head, len(keys), SPACES=len(rows), KEYS=_KEYS
    )


def read_triton(
    words: Tensor, keys: Tensor, count: Tensor, bases: Tensor, rows: Tensor, first: int, share: int, out: Tensor
) -> None:
    """See :func:`torch_engram.stores.host_asks.read_naive`; ``words`` is pinned."""
    width = words.shape[1]
    programs = max(1, min(_PROGRAMS, triton.cdiv(len(keys), _ROWS)))
    _read[(programs,)](
        words, keys, count, bases, rows, out.view(torch.int64), first, share, programs,
        SPACES=len(rows), WIDTH=width, TILE=triton.next_power_of_2(width), ROWS=_ROWS,
    )  # fmt: skip


@triton.jit
def _located(keys, number, here, bases, rows, SPACES: tl.constexpr):
    """Where some keys' rows are in the table, and whether they are there at all."""
    key = tl.load(keys + number, mask=here, other=-1)
    space, row = key >> _SHIFT, key & _MASK
    known = here & (space >= 0) & (space < SPACES)
    known &= row < tl.load(rows + space, mask=known, other=0)
    return tl.load(bases + space, mask=known, other=0) + row, known


@triton.jit(do_not_specialize=("capacity",))
def _send(keys, count, bases, rows, index, head, capacity, SPACES: tl.constexpr, KEYS: tl.constexpr):
    wanted = tl.minimum(tl.load(count), capacity)
    if tl.program_id(0) == 0:
        tl.store(head, wanted)
    number = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    here = number < wanted
    at, known = _located(keys, number, here, bases, rows, SPACES)
    tl.store(index + number, tl.where(known, at, -1), mask=here)
    tl.store(head + 1 + number * 0, tl.full([KEYS], 1, tl.int64), mask=here & ~known)


@triton.jit(do_not_specialize=("first", "share", "programs"))
def _read(
    words, keys, count, bases, rows, out, first, share, programs,
    SPACES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wanted = tl.load(count)
    wanted = tl.minimum(wanted, first + wanted * share // _SHARES)
    word = tl.arange(0, TILE)
    for begin in range(tl.program_id(0) * ROWS, wanted, programs * ROWS):
        number = (begin + tl.arange(0, ROWS)).to(tl.int64)
        at, known = _located(keys, number, number < wanted, bases, rows, SPACES)
        inside = known[:, None] & (word < WIDTH)[None]
        value = tl.load(words + at[:, None] * WIDTH + word[None], mask=inside)
        tl.store(out + number[:, None] * WIDTH + word[None], value, mask=inside)
