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
from torch_engram.stores.slots import CLAIMED, Found, Slots

_KEYS = 1024
"""Keys that one program sends."""
_PROGRAMS, _ROWS = 256, 4
"""Programs that read rows, and rows that each reads together: the bus has all it can take under way with fewer."""
_MANY, _MANY_PROGRAMS, _MANY_ROWS = 1 << 18, 32, 16
"""From so many keys on, as training asks for, nobody waits for the rows, but a network computes beside them: then fewer
programs read them, of which each reads more, and the other processors stay with the network."""
_SHARES = tl.constexpr(SHARES)
_MASK, _SHIFT = tl.constexpr(ROW_MASK), tl.constexpr(SPACE_SHIFT)
_UNCLAIMED = tl.constexpr(~CLAIMED)


def send_triton(keys: Tensor, count: Tensor, bases: Tensor, rows: Tensor, index: Tensor, head: Tensor) -> None:
    """See :func:`torch_engram.stores.host_asks.send_naive`; ``index`` and ``head`` are pinned."""
    _send[(max(1, triton.cdiv(len(keys), _KEYS)),)](
        keys, count, bases, rows, index, head, len(keys), SPACES=len(rows), KEYS=_KEYS
    )


def read_triton(
    words: Tensor, keys: Tensor, count: Tensor, bases: Tensor, rows: Tensor, head: Tensor, first: int, share: int,
    out: Tensor,
) -> None:  # fmt: skip
    """See :func:`torch_engram.stores.host_asks.read_naive`; ``words`` and ``head`` are in host memory."""
    width = words.shape[1]
    most, many = (_PROGRAMS, _ROWS) if len(keys) < _MANY else (_MANY_PROGRAMS, _MANY_ROWS)
    programs = max(1, min(most, triton.cdiv(len(keys), many)))
    _read[(programs,)](
        words, keys, count, bases, rows, head, out.view(torch.int64), first, share, programs,
        SPACES=len(rows), WIDTH=width, TILE=triton.next_power_of_2(width), ROWS=many,
    )  # fmt: skip


def place_triton(
    words: Tensor, keys: Tensor, count: Tensor, bases: Tensor, rows: Tensor, head: Tensor, out: Tensor, slots: Slots,
    found: Found,
) -> None:  # fmt: skip
    """See :func:`torch_engram.stores.host_asks.place_naive`; ``words`` and ``head`` are in host memory."""
    width = words.shape[1]
    programs = max(1, min(_PROGRAMS, triton.cdiv(len(keys), _ROWS)))
    _place[(programs,)](
        words, keys, count, bases, rows, head, out.view(torch.int64),
        found.targets, found.owners, slots.records.view(torch.int64), slots.tags, programs,
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


@triton.jit
def _begin(count, head):
    """How many rows are wanted, which the host is told, too."""
    wanted = tl.load(count)
    if tl.program_id(0) == 0:
        tl.store(head, wanted)
    return wanted


@triton.jit
def _rows(words, keys, number, here, bases, rows, head, SPACES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Some keys' rows of the table, with what is there of them; the host is told of a key whose row is not."""
    at, known = _located(keys, number, here, bases, rows, SPACES)
    tl.store(head + 1 + number * 0, number * 0 + 1, mask=here & ~known)
    word = tl.arange(0, TILE)[None]
    inside = known[:, None] & (word < WIDTH)
    return tl.load(words + at[:, None] * WIDTH + word, mask=inside), inside


@triton.jit(do_not_specialize=("first", "share", "programs"))
def _read(
    words, keys, count, bases, rows, head, out, first, share, programs,
    SPACES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wanted = _begin(count, head)
    wanted = tl.minimum(wanted, first + wanted * share // _SHARES)
    word = tl.arange(0, TILE)[None]
    for begin in range(tl.program_id(0) * ROWS, wanted, programs * ROWS):
        number = (begin + tl.arange(0, ROWS)).to(tl.int64)
        value, inside = _rows(words, keys, number, number < wanted, bases, rows, head, SPACES, WIDTH, TILE)
        tl.store(out + number[:, None] * WIDTH + word, value, mask=inside)


@triton.jit(do_not_specialize=("programs",))
def _place(
    words, keys, count, bases, rows, head, out, targets, owners, records, tags, programs,
    SPACES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wanted = _begin(count, head)
    word = tl.arange(0, TILE)[None]
    for begin in range(tl.program_id(0) * ROWS, wanted, programs * ROWS):
        number = (begin + tl.arange(0, ROWS)).to(tl.int64)
        here = number < wanted
        value, inside = _rows(words, keys, number, here, bases, rows, head, SPACES, WIDTH, TILE)
        target = tl.load(targets + number, mask=here, other=-1)[:, None]
        tl.store(records + target * WIDTH + word, value, mask=inside & (target >= 0))
        tl.store(out + number[:, None] * WIDTH + word, value, mask=inside & (target < 0))
        owner = tl.load(owners + number, mask=here, other=-1)
        tag = tl.load(tags + owner, mask=owner >= 0, other=0)
        tl.store(tags + owner, tag & _UNCLAIMED, mask=owner >= 0)
