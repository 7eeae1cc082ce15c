"""A cache's table on a GPU: the Triton twins of :mod:`torch_engram.stores.slots`.

Finding is two launches, or one where a single program has all reads. The first stamps what is there or awaited, so that
the second evicts none of it. In the second, a read without a place looks for the oldest one of its set and claims it by
compare-and-swap on the tag. Places of a set are tried in one fixed order and stay claimed, so two reads of one tag meet
at the same place: one claims it, the other finds its own mark there. Only where an earlier batch is filled at this
moment may they see other places free, and take two, which then hold the same. Which tag gets which place may differ
from run to run, and so may the order of what is missing; the records that a read gets do not. Offsets are int64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.stores import counter, slots
from torch_engram.stores.counter_kernels import scramble
from torch_engram.stores.records import SPACE_SHIFT

if TYPE_CHECKING:
    from torch_engram.stores.slots import Found, Reads, Slots

_READS = 32
"""Reads that one program looks for: a warp's, whose threads need not wait for others."""
_WORDS = 1024
"""Words that one program moves together."""
_ROWS = 32
"""Rows that one program overwrites."""
_VARYING = ("count", "positions", "words")
"""Numbers that differ from batch to batch: a kernel is not compiled anew for those that 16 divides."""
_COLUMNS = tl.constexpr(7)
_COUNTS = tl.constexpr(len(slots.COUNTS))
_WAYS = tl.constexpr(slots.WAYS)
_EMPTY = tl.constexpr(slots.EMPTY)
_LAST_TAG = tl.constexpr(slots.LAST_TAG)
_CLAIMED = tl.constexpr(slots.CLAIMED)
_GAMMA = tl.constexpr(counter.GAMMA)
_SHIFT = tl.constexpr(SPACE_SHIFT)
_MINE, _TAKEN = tl.constexpr(-2), tl.constexpr(2**31 - 1)
"""Ages of a place that this read's tag has claimed already, and of one that it may not claim."""


def find_triton(table: Slots, reads: Reads) -> Found:
    """See :meth:`Slots.find`."""
    from torch_engram.stores.slots import Found

    count, most = len(reads.tags), max(region.parts for region in table.regions)
    where = torch.empty_like(reads.tags)
    missing = reads.tags.new_empty(3, -(-count * most // 16) * 16)  # each of the three aligned for wide accesses
    total = reads.tags.new_empty(2) if count else reads.tags.new_zeros(2)
    keys, targets, owners = missing.unbind()
    if not count:
        return Found(where, keys, targets, owners, total)
    grid = (triton.cdiv(count, _READS),)
    by_space = reads.by_space is not None
    asked = (reads.tags, reads.regions, reads.by_space if by_space else reads.tags)
    shape = (count, reads.positions, reads.groups)
    regions = triton.next_power_of_2(len(reads.regions))
    kinds = dict(REGIONS=len(reads.regions), TILE=regions, BY_SPACE=by_space, READS=_READS, num_warps=1)
    at_once = count <= _READS
    if not at_once:
        _probe[grid](*asked, table.tags, table.stamps, where, total, table.counts, table.clock, *shape, **kinds)
    _claim[grid](
        *asked, reads.rows, table.tags, table.stamps, where, keys, targets, owners, total, table.counts, table.clock,
        *shape, reads.rows.shape[1], PARTS=most, PROBES=at_once, **kinds,
    )  # fmt: skip
    return Found(where, keys, targets, owners, total)


def fill_triton(table: Slots, found: Found, records: Tensor) -> None:
    """See :meth:`Slots.fill`."""
    words = records.view(torch.int64)
    if len(words):
        _fill[(triton.cdiv(words.numel(), _WORDS),)](
            words, found.targets, found.owners, found.count, table.records.view(torch.int64), table.tags,
            words.numel(), WIDTH=words.shape[1], WORDS=_WORDS,
        )  # fmt: skip


def collect_triton(table: Slots, where: Tensor, fetched: Tensor) -> Tensor:
    """See :meth:`Slots.collect`."""
    out = torch.empty(len(where), table.records.shape[1], dtype=torch.uint8, device=where.device)
    if len(where):
        words = out.view(torch.int64)
        _collect[(triton.cdiv(words.numel(), _WORDS),)](
            where, table.records.view(torch.int64), fetched.view(torch.int64), words,
            words.numel(), WIDTH=words.shape[1], WORDS=_WORDS,
        )  # fmt: skip
    return out


def overwrite_triton(table: Slots, reads: Reads, records: Tensor) -> None:
    """See :meth:`Slots.overwrite`."""
    words = records.view(torch.int64)
    if len(words):
        _overwrite[(triton.cdiv(len(words), _ROWS),)](
            reads.tags, reads.regions, reads.by_space, table.tags, words, table.records.view(torch.int64),
            len(words), words.shape[1], READS=_ROWS, WORDS=_WORDS // _ROWS,
        )  # fmt: skip


@triton.jit
def _first_way(tag, region):
    """The first place of the set of each tag, from the constants of its region."""
    high = (scramble(tag + tl.load(region + 6) * _GAMMA) >> 33) & 0x7FFFFFFF
    return (tl.load(region) + ((high * tl.load(region + 1)) >> 31)) * _WAYS


@triton.jit
def _record(slot, region):
    """The first record of the entry at each place."""
    return tl.load(region + 2) + (slot - tl.load(region) * _WAYS) * tl.load(region + 3)


@triton.jit
def _ask(asked, regions, by_space, count, positions, groups, BY_SPACE: tl.constexpr, READS: tl.constexpr):
    """Some reads' numbers, whether there are such, their tags and which region each is of."""
    read = tl.program_id(0).to(tl.int64) * READS + tl.arange(0, READS)
    here = read < count
    tag = tl.load(asked + read, mask=here, other=0)
    if BY_SPACE:
        which = tl.load(by_space + (tag >> _SHIFT), mask=here, other=0)
    else:
        which = tl.where(here, read // (positions * groups) * groups + read % groups, 0)
    return read, here, tag, which


@triton.jit
def _probes(
    asked, regions, by_space, tags, stamps, where, missing, counts, clock, count, positions, groups,
    REGIONS: tl.constexpr, TILE: tl.constexpr, BY_SPACE: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """Stamp what is there or awaited."""
    epoch = tl.load(clock) + 1
    if tl.program_id(0) == 0:
        tl.store(missing, 0)
        tl.store(missing + 1, epoch.to(tl.int64))
    read, here, tag, which = _ask(asked, regions, by_space, count, positions, groups, BY_SPACE, READS)
    region = regions + which * _COLUMNS
    first = _first_way(tag, region)
    way = tl.arange(0, _WAYS)
    there = tl.load(tags + first[:, None] + way[None], mask=here[:, None], other=_EMPTY)
    admits = here & (tag >= 0) & (tag <= _LAST_TAG)
    found = tl.max(tl.where((there == tag[:, None]) & admits[:, None], way[None], -1), axis=1)
    awaited = tl.max(tl.where((there == (tag | _CLAIMED)[:, None]) & admits[:, None], way[None], -1), axis=1)
    hit = found >= 0
    slot = first + tl.maximum(found, awaited)
    tl.store(stamps + slot, tl.full([READS], 1, tl.int32) * epoch, mask=hit | (awaited >= 0))
    record = _record(slot, region)
    tl.store(where + read, tl.where(hit, record, -1), mask=here)
    line, hits = _tally(counts, regions, which, hit.to(tl.int64), REGIONS, TILE)
    tl.atomic_add(line, hits, mask=hits > 0)


@triton.jit
def _claims(
    asked, regions, by_space, rows, tags, stamps, where, keys, targets, owners, missing, counts, clock,
    count, positions, groups, columns,
    PARTS: tl.constexpr, REGIONS: tl.constexpr, TILE: tl.constexpr, BY_SPACE: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """Claim places for what is not, and say what is missing."""
    epoch = tl.load(missing + 1).to(tl.int32)
    if tl.program_id(0) == 0:
        tl.store(clock, epoch)
    read, here, tag, which = _ask(asked, regions, by_space, count, positions, groups, BY_SPACE, READS)
    missed = here & (tl.load(where + read, mask=here, other=0) < 0)
    if tl.max(missed.to(tl.int32), axis=0) > 0:
        region = regions + which * _COLUMNS
        first = _first_way(tag, region)
        slot, won, evicts = _take(tag, missed, first, tags, stamps, epoch, READS)
        spilled = missed & (slot < 0)
        parts = tl.where(won | spilled, tl.load(region + 3), 0)
        begins = tl.atomic_add(missing, tl.sum(parts, axis=0)) + tl.cumsum(parts, axis=0) - parts
        record = _record(slot, region)
        tl.store(where + read, tl.where(spilled, -2 - begins, record), mask=missed)
        row = rows + read // groups * columns + tl.load(region + 4)
        offset = tl.load(region + 5)
        for part in range(PARTS):
            wanted = part < parts
            at = begins + part
            tl.store(keys + at, tl.load(row + part, mask=wanted, other=0) + offset, mask=wanted)
            tl.store(targets + at, tl.where(won, record + part, -1), mask=wanted)
            tl.store(owners + at, tl.where(won & (part == 0), slot, -1), mask=wanted)
        # up to READS of each fit in 16 bits: repeats, misses, evictions, overflow
        one = tl.where(won | spilled, 1 << 16, 1).to(tl.int64)
        one += (evicts.to(tl.int64) << 32) + (spilled.to(tl.int64) << 48)
        line, packed = _tally(counts, regions, which, tl.where(missed, one, 0), REGIONS, TILE)
        for number in tl.static_range(4):
            many = (packed >> (16 * number)) & 0xFFFF
            tl.atomic_add(line + 1 + number, many, mask=many > 0)


@triton.jit(do_not_specialize=_VARYING)
def _probe(
    asked, regions, by_space, tags, stamps, where, missing, counts, clock, count, positions, groups,
    REGIONS: tl.constexpr, TILE: tl.constexpr, BY_SPACE: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    _probes(asked, regions, by_space, tags, stamps, where, missing, counts, clock, count, positions, groups,
            REGIONS, TILE, BY_SPACE, READS)  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def _claim(
    asked, regions, by_space, rows, tags, stamps, where, keys, targets, owners, missing, counts, clock,
    count, positions, groups, columns,
    PARTS: tl.constexpr, REGIONS: tl.constexpr, TILE: tl.constexpr, BY_SPACE: tl.constexpr, READS: tl.constexpr,
    PROBES: tl.constexpr,
):  # fmt: skip
    if PROBES:  # one program does it all
        _probes(asked, regions, by_space, tags, stamps, where, missing, counts, clock, count, positions, groups,
                REGIONS, TILE, BY_SPACE, READS)  # fmt: skip
        tl.debug_barrier()
    _claims(asked, regions, by_space, rows, tags, stamps, where, keys, targets, owners, missing, counts, clock,
            count, positions, groups, columns, PARTS, REGIONS, TILE, BY_SPACE, READS)  # fmt: skip


@triton.jit
def _tally(counts, regions, which, one, REGIONS: tl.constexpr, TILE: tl.constexpr):
    """For every region where it counts, and the sum of ``one`` over the reads that are of it."""
    number = tl.arange(0, TILE)
    line = counts + tl.load(regions + number * _COLUMNS + 6, mask=number < REGIONS, other=0) * _COUNTS
    return line, tl.sum(tl.where(which[:, None] == number[None], one[:, None], 0), axis=0)


@triton.jit
def _take(tag, missed, first, tags, stamps, epoch, READS: tl.constexpr):
    """Places for the reads that missed, -1 for none; whether each is the one that claimed it; whether from another."""
    mark = tag | _CLAIMED
    admits = (tag >= 0) & (tag <= _LAST_TAG)
    way = tl.arange(0, _WAYS)
    place = tl.full([READS], -1, tl.int64)
    won = missed & (tag != tag)
    evicts = won
    seeks = missed & admits
    left = tl.max(seeks.to(tl.int32), axis=0)
    while left > 0:
        there = tl.load(tags + first[:, None] + way[None], mask=seeks[:, None], other=0, volatile=True)
        stamp = tl.load(stamps + first[:, None] + way[None], mask=seeks[:, None], other=0)
        age = tl.where((there >= 0) & (stamp < epoch), stamp, _TAKEN)
        age = tl.where(there == _EMPTY, -1, age)
        age = tl.where(there == mark[:, None], _MINE, age)
        best = tl.min(age, axis=1)
        chosen = tl.argmin(age, axis=1)
        expected = tl.sum(tl.where(way[None] == chosen[:, None], there, 0), axis=1)
        slot = first + chosen
        tries = seeks & (best != _MINE) & (best != _TAKEN)
        # who does not try swaps a value for itself
        old = tl.atomic_cas(tags + slot, tl.where(tries, expected, mark), mark)
        got = tries & (old == expected)
        done = got | (seeks & (best == _MINE)) | (tries & (old == mark))
        place = tl.where(done, slot, place)
        won = won | got
        tl.store(stamps + slot, tl.full([READS], 1, tl.int32) * epoch, mask=got)
        evicts = evicts | (got & (expected != _EMPTY))
        seeks = seeks & (done == 0) & (best != _TAKEN)
        left = tl.max(seeks.to(tl.int32), axis=0)
    return place, won, evicts


@triton.jit(do_not_specialize=_VARYING)
def _fill(fetched, targets, owners, count, records, tags, words, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    here = (number < words) & (number < tl.load(count) * WIDTH)
    row, word = number // WIDTH, number % WIDTH
    target = tl.load(targets + row, mask=here, other=-1)
    placed = target >= 0
    tl.store(records + target * WIDTH + word, tl.load(fetched + number, mask=placed), mask=placed)
    owner = tl.load(owners + row, mask=here & (word == 0), other=-1)
    owns = owner >= 0
    tag = tl.load(tags + owner, mask=owns, other=0)
    tl.store(tags + owner, tag & 0x7FFFFFFFFFFFFFFF, mask=owns)


@triton.jit(do_not_specialize=_VARYING)
def _collect(where, records, fetched, out, words, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    here = number < words
    word = number % WIDTH
    at = tl.load(where + number // WIDTH, mask=here, other=0)
    cached = here & (at >= 0)
    outside = here & (at < 0)
    value = tl.load(records + at * WIDTH + word, mask=cached, other=0)
    value += tl.load(fetched + (-2 - at) * WIDTH + word, mask=outside, other=0)
    tl.store(out + number, value, mask=here)


@triton.jit(do_not_specialize=_VARYING)
def _overwrite(asked, regions, by_space, tags, new, records, count, width, READS: tl.constexpr, WORDS: tl.constexpr):
    read, here, tag, which = _ask(asked, regions, by_space, count, 1, 1, True, READS)
    region = regions + which * _COLUMNS
    first = _first_way(tag, region)
    way = tl.arange(0, _WAYS)
    there = tl.load(tags + first[:, None] + way[None], mask=here[:, None], other=_EMPTY)
    found = tl.max(tl.where(there == tag[:, None], way[None], -1), axis=1)
    hit = here & (found >= 0)
    target = _record(first + found, region)
    for begin in range(0, width, WORDS):
        word = begin + tl.arange(0, WORDS)
        inside = hit[:, None] & (word < width)[None]
        value = tl.load(new + read[:, None] * width + word[None], mask=inside)
        tl.store(records + target[:, None] * width + word[None], value, mask=inside)
