"""The table of a cache: entries of records found by an integer, in a memory of fixed size, filled and emptied there.

An entry is all records that one read wants: one row's, or those of all heads of an n-gram. Its *tag*, from 0 to
2**63 - 2, hashes to a set of :data:`WAYS` places. A read that finds its tag stamps the place with the number of the
batch, and what a batch has stamped, the same batch does not evict. A read that does not find it claims the place that
was stamped longest ago: reads of one tag claim one place, so nothing has to be sorted. Where a batch has stamped a
whole set the read goes without a place, and its records are used from where they were fetched to.

A batch goes :meth:`Slots.find`, then :meth:`Slots.fill` with the records of what was missing. A claimed tag has its
sign bit set until it is filled, so that nothing evicts it before. A batch that begins in between takes it for one that
is there, and so has to be served after the first batch is filled; it may look while that is being done, for all that
filling changes of a place that somebody has found is the sign bit. The Triton twins are in
:mod:`torch_engram.stores.slot_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_engram.kernels import use_kernels
from torch_engram.stores.counter import GAMMA, scramble
from torch_engram.stores.records import SPACE_SHIFT

WAYS = 16
"""Places of a set: their tags are one cache line of a GPU."""
EMPTY = -1
CLAIMED = -(2**63)
"""The sign bit: what a tag is marked with until its entry is filled."""
LAST_TAG = 2**63 - 2
COUNTS = ("hits", "repeats", "misses", "evictions", "overflow")
"""What is counted, in reads: found; not found, but fetched for another read of the batch; fetched; and of the fetched
those that took another entry's place, and those that got none."""
_LAST_EPOCH = 2**31 - 2
_ENTRY_BYTES = 8 + 4  # a tag and a stamp


@dataclass(frozen=True)
class Region:
    """Entries of one kind: their size, and how the rows that they hold are found among those that a read is given."""

    space: int
    order: int = 0
    """Which of the space's n-gram orders, counted from 0."""
    parts: int = 1
    """Records of an entry."""
    first_column: int = 0
    """Where the entry's rows begin among the rows of a position."""
    key_offset: int = 0
    """What makes a row id the store's key."""


@dataclass(frozen=True)
class Reads:
    """What a batch wants: ``m`` entries, ``groups`` of them at each position."""

    tags: Tensor
    """int64 ``[m]``, contiguous."""
    rows: Tensor
    """int64 ``[m / groups, columns]``, contiguous: the rows of every position."""
    regions: Tensor
    """int64 ``[R, 7]``, from :meth:`Slots.plan`."""
    groups: int
    positions: int
    """Positions of one space; reads are ordered by space, position and group, regions by space and group."""
    by_space: Tensor | None = None
    """int64: the region of every space, where the space is said by the tag itself (space << 40 | row)."""

    def which(self) -> Tensor:
        """The region, among ``regions``, of every read: int64 ``[m]``."""
        if self.by_space is not None:
            return self.by_space[self.tags >> SPACE_SHIFT]
        read = torch.arange(len(self.tags), device=self.tags.device)
        return read // (self.positions * self.groups) * self.groups + read % self.groups


@dataclass(frozen=True)
class Found:
    """Where the entries of a batch are, and what has to be fetched for it."""

    where: Tensor
    """int64 ``[m]``: the entry's first record in the cache; or -2 - i, where its first is the i-th that is missing."""
    keys: Tensor
    """int64 ``[k]``: the rows that are missing."""
    targets: Tensor
    """int64 ``[k]``: the record in the cache where each belongs, -1 for none."""
    owners: Tensor
    """int64 ``[k]``: the place whose first record it is, -1 for all others."""
    count: Tensor
    """int64 ``[2]``: how many of the ``k`` above are meant, and the batch's number. Kernels make room for all that
    could be missing, so that nobody has to wait for this until the rows are fetched."""

    def first(self, count: int) -> Found:
        """The same, when it is known that ``count`` are missing."""
        return Found(self.where, self.keys[:count], self.targets[:count], self.owners[:count], self.count)


class Slots:
    """A table of entries of ``nbytes``-long records on ``device``, ``budget`` bytes with tags and stamps at most.

    The budget is split evenly between ``regions``. Raises ``ValueError`` when that leaves less than one set to any.
    """

    def __init__(self, regions: Sequence[Region], nbytes: int, budget: int, device: torch.device):
        self.regions, self.device = tuple(regions), device
        sizes = [WAYS * (region.parts * nbytes + _ENTRY_BYTES) for region in regions]
        if budget // len(sizes) < max(sizes):
            raise ValueError(f"A cache of {budget:,} bytes is too small: give {len(sizes) * max(sizes):,} or more.")
        sets = [min(budget // len(sizes) // size, 2**31 - 1) for size in sizes]
        plan, first, record = [], 0, 0
        for number, (region, count) in enumerate(zip(regions, sets, strict=True)):
            plan.append([first, count, record, region.parts, region.first_column, region.key_offset, number])
            first += count
            record += count * WAYS * region.parts
        self.tags = torch.full((first * WAYS,), EMPTY, dtype=torch.int64, device=device)
        self.stamps = torch.zeros(first * WAYS, dtype=torch.int32, device=device)
        self.records = torch.empty(record, nbytes, dtype=torch.uint8, device=device)
        self.counts = torch.zeros(len(plan), len(COUNTS), dtype=torch.int64, device=device)
        self.clock = torch.zeros(1, dtype=torch.int32, device=device)
        """The number of the batch, on the device so that it also goes on where launches are replayed."""
        self._batches = 0
        self._plan = torch.tensor(plan, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of tags, stamps and records."""
        return sum(tensor.nbytes for tensor in (self.tags, self.stamps, self.records))

    def plan(self, spaces: Sequence[int] | None = None) -> Tensor:
        """The regions of some spaces in their order, or of all, as :class:`Reads` wants them: int64 ``[R, 7]``."""
        if spaces is None:
            return self._plan
        chosen = [i for space in spaces for i, region in enumerate(self.regions) if region.space == space]
        return self._plan[torch.tensor(chosen, device=self.device)]

    def find(self, reads: Reads) -> Found:
        """Stamp what is there, and claim places for what is not, after a :meth:`tick`. On a GPU it waits for nothing
        and may be captured in a graph; every replay then follows a tick."""
        if use_kernels(reads.tags):
            from torch_engram.stores.slot_kernels import find_triton

            return find_triton(self, reads)
        return find_naive(self, reads)

    def fill(self, found: Found, records: Tensor) -> None:
        """Put the records uint8 ``[k, nbytes]`` of ``found.keys`` in their places, which are found from now on; records
        past ``found.count`` mean nothing."""
        if use_kernels(records):
            from torch_engram.stores.slot_kernels import fill_triton

            fill_triton(self, found, records)
        else:
            fill_naive(self, found, records)

    def collect(self, where: Tensor, fetched: Tensor) -> Tensor:
        """Records uint8 ``[m, nbytes]`` of a batch whose entries hold one each; ``fetched``: what :meth:`fill` got."""
        if use_kernels(where):
            from torch_engram.stores.slot_kernels import collect_triton

            return collect_triton(self, where, fetched)
        return pick(self.records, fetched, where)

    def overwrite(self, reads: Reads, records: Tensor) -> None:
        """Replace the records uint8 ``[m, nbytes]`` of those entries of one record that are there; tags distinct."""
        if use_kernels(records):
            from torch_engram.stores.slot_kernels import overwrite_triton

            overwrite_triton(self, reads, records)
        else:
            overwrite_naive(self, reads, records)

    def release(self, found: Found) -> None:
        """Give up what a batch has claimed, after a fetch that failed."""
        owners = found.owners[: int(found.count[0])]
        self.tags[owners[owners >= 0]] = EMPTY

    def clear(self) -> None:
        """Forget every entry."""
        self.tags.fill_(EMPTY)

    def tick(self) -> None:
        """One more batch is about to be found."""
        if self._batches == _LAST_EPOCH:  # stamps are 32 bits: forget who was used when
            self.stamps.zero_()
            self.clock.zero_()
            self._batches = 0
        self._batches += 1


def pick(records: Tensor, fetched: Tensor, index: Tensor) -> Tensor:
    """Rows ``[m, nbytes]``: ``records[i]``, or ``fetched[-2 - i]`` where the index i is negative."""
    picked = records[index.clamp(min=0)]
    outside = index < 0
    if outside.any():
        picked[outside] = fetched[-2 - index[outside]]
    return picked


def _sets_of(tags: Tensor, regions: Tensor) -> Tensor:
    """The first place of each tag's set; ``regions``: ``[m, 7]``, each tag's own."""
    high = (scramble(tags + regions[:, 6] * GAMMA) >> 33) & (2**31 - 1)
    return (regions[:, 0] + (high * regions[:, 1] >> 31)) * WAYS


def _ways_of(first: Tensor) -> Tensor:
    return first[:, None] + torch.arange(WAYS, device=first.device)


def find_naive(slots: Slots, reads: Reads) -> Found:
    """See :meth:`Slots.find`."""
    slots.clock.add_(1)
    tags, regions = reads.tags, reads.regions[reads.which()]
    first = _sets_of(tags, regions)
    there = slots.tags[_ways_of(first)]
    admits = ((tags >= 0) & (tags <= LAST_TAG))[:, None]
    hits, awaited = ((there == wanted[:, None]) & admits for wanted in (tags, tags | CLAIMED))
    hit, slot = hits.any(1), first + (hits | awaited).int().argmax(1)
    placed = hit | awaited.any(1)  # an earlier batch has claimed it and is filled before this one is served
    slots.stamps[slot[placed]] = slots.clock
    _count(slots, "hits", regions[hit])
    _count(slots, "repeats", regions[placed & ~hit])
    missed = (~placed).nonzero().squeeze(1)
    distinct, inverse = torch.stack((first[missed], tags[missed]), 1).unique(dim=0, return_inverse=True)
    wanted = torch.empty(len(distinct), dtype=torch.int64, device=tags.device)
    wanted[inverse] = missed  # one of the reads that want it
    _count(slots, "misses", regions[wanted])
    _count(slots, "repeats", regions[missed])
    _count(slots, "repeats", regions[wanted], -1)
    taken, claimed = _claim(slots, *distinct.t().contiguous())
    _count(slots, "overflow", regions[wanted[~claimed]])
    _count(slots, "evictions", regions[wanted[claimed]][slots.tags[taken[claimed]] != EMPTY])
    slots.tags[taken[claimed]] = distinct[claimed, 1] | CLAIMED
    slots.stamps[taken[claimed]] = slots.clock
    keys, targets, owners, count = _missing(reads, regions[wanted], wanted, taken, claimed)
    where = torch.empty_like(tags)
    where[placed] = _record(regions[placed], slot[placed])
    parts = regions[wanted, 3]
    begins = parts.cumsum(0) - parts
    where[missed] = torch.where(claimed, _record(regions[wanted], taken), -2 - begins)[inverse]
    return Found(where, keys, targets, owners, torch.stack((count, slots.clock[0].long())))


def _claim(slots: Slots, first: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
    """A place for each of some distinct tags, sorted by set, and whether it got one: int64 and bool ``[d]``."""
    ways = _ways_of(first)
    there, stamps = slots.tags[ways], slots.stamps[ways]
    free = (there == EMPTY) | (there >= 0) & (stamps < slots.clock)
    age = torch.where(there == EMPTY, -1, stamps).masked_fill(~free, 2**31 - 1)
    rank = torch.arange(len(first), device=first.device) - torch.searchsorted(first, first)
    way = age.argsort(dim=1, stable=True).gather(1, rank.clamp(max=WAYS - 1)[:, None]).squeeze(1)
    claimed = (rank < free.sum(1)) & (tags >= 0) & (tags <= LAST_TAG)
    return first + way, claimed


def _record(regions: Tensor, slot: Tensor) -> Tensor:
    """The first record of the entry at each place."""
    return regions[:, 2] + (slot - regions[:, 0] * WAYS) * regions[:, 3]


def _missing(
    reads: Reads, regions: Tensor, wanted: Tensor, taken: Tensor, claimed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, targets, owners and count of :class:`Found`: rows of the reads ``wanted``, one entry after the other."""
    part = torch.arange(int(regions[:, 3].max()) if len(regions) else 1, device=wanted.device)
    here = part < regions[:, 3, None]
    column = (regions[:, 4, None] + part).clamp(max=reads.rows.shape[1] - 1)
    keys = reads.rows[(wanted // reads.groups)[:, None], column] + regions[:, 5, None]
    targets = torch.where(claimed[:, None], _record(regions, taken)[:, None] + part, -1)
    owners = torch.where(claimed[:, None] & (part == 0), taken[:, None], -1)
    return keys[here], targets[here], owners[here], here.sum()


def _count(slots: Slots, what: str, regions: Tensor, by: int = 1) -> None:
    slots.counts[:, COUNTS.index(what)] += by * regions[:, 6].bincount(minlength=len(slots.counts))


def fill_naive(slots: Slots, found: Found, records: Tensor) -> None:
    """See :meth:`Slots.fill`."""
    targets, owners = (part[: min(len(records), int(found.count[0]))] for part in (found.targets, found.owners))
    placed = targets >= 0
    slots.records[targets[placed]] = records[: len(targets)][placed]
    slots.tags[owners[owners >= 0]] &= ~CLAIMED


def overwrite_naive(slots: Slots, reads: Reads, records: Tensor) -> None:
    """See :meth:`Slots.overwrite`."""
    regions = reads.regions[reads.which()]
    ways = _ways_of(_sets_of(reads.tags, regions))
    number, way = (slots.tags[ways] == reads.tags[:, None]).nonzero().unbind(1)
    slots.records[_record(regions[number], ways[number, way])] = records[number]
