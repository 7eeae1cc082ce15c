"""A table that is divided over ranks to disk and back, in the files of one that is not.

Saved whole, a file holds consecutive rows, and every rank has a share of those: so ranks take turns at files, and each
writes one while all send it what they hold of it, a chunk at a time. What changed since an earlier save every rank
writes for itself, into a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from torch_engram.durable import sync
from torch_engram.memory.exchange import Exchange, swap
from torch_engram.stores import Manifest, Part, RecordLayout, Shard, planes_of
from torch_engram.stores.parts import CHUNK_ROWS, ROWS_PER_PART, takes_changes, write_changes, write_rows

Fetch = Callable[[Tensor], Tensor]
"""Rows that this rank holds, int64 ``[n]``, to their records uint8 ``[n, nbytes]``."""


def save_shards(exchange: Exchange, folder: Path, rows: int, layout: RecordLayout, fetch: Fetch) -> Manifest:
    """As :func:`~torch_engram.stores.save_table`, of what all ranks hold. Collective, failures included."""
    shard, parts = exchange.shard, list[Part]()
    for begin in range(0, rows, ROWS_PER_PART * shard.ranks):
        longest = min(ROWS_PER_PART, rows - begin)
        with exchange.together():
            folder.mkdir(parents=True, exist_ok=True)
            reads = _JoinedReads(exchange, fetch, layout, calls=-(-longest // CHUNK_ROWS))
            first = begin + shard.rank * ROWS_PER_PART
            try:
                if first < rows:
                    parts.append(write_rows(folder, first, min(first + ROWS_PER_PART, rows), layout, reads))
            finally:
                reads.serve()
    return Manifest(rows, planes_of(layout), _of_all_ranks(exchange, folder, parts))


def save_touched_shards(
    exchange: Exchange, folder: Path, rows: int, touched: Tensor, layout: RecordLayout, fetch: Fetch
) -> Manifest:
    """As :func:`~torch_engram.stores.save_touched`; ``touched``: of the rows that this rank holds. Collective."""
    with exchange.together():
        folder.mkdir(parents=True, exist_ok=True)
        parts = write_changes(folder, touched, layout, fetch)
    every = _of_all_ranks(exchange, folder, parts)
    return Manifest(rows, planes_of(layout), every, sum(part.rows for part in every))


def update_shards(
    exchange: Exchange, folder: Path, earlier: Manifest, changed: Tensor, layout: RecordLayout, fetch: Fetch
) -> Manifest:
    """As :func:`~torch_engram.stores.update_table`; ``changed``: of the rows that this rank holds. Collective."""
    everywhere = sum(int(count) for count in exchange.tell(str(len(changed))))
    if not exchange.all(takes_changes(folder, earlier, everywhere, layout)):
        return save_shards(exchange, folder, earlier.rows, layout, fetch)
    with exchange.together():
        parts = write_changes(folder, changed, layout, fetch)
    return replace(earlier, parts=(*earlier.parts, *_of_all_ranks(exchange, folder, parts)))


def only_held(shard: Shard, write: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, Tensor], None]:
    """``write`` of what this rank holds of rows int64 ``[n]`` and their records."""

    def write_held(rows: Tensor, records: Tensor) -> None:
        held = shard.owners(rows) == shard.rank
        if held.any():
            write(rows[held], records[held])

    return write_held


def _of_all_ranks(exchange: Exchange, folder: Path, mine: list[Part]) -> tuple[Part, ...]:
    """The parts that the ranks wrote, by their first row; those that list their rows in the order of the ranks."""
    with exchange.together():
        sync(folder)
    told = exchange.tell(json.dumps([asdict(part) for part in mine]))
    parts = [Part(**part) for each in told for part in json.loads(each)]
    return tuple(sorted(parts, key=lambda part: part.first or 0))


class _JoinedReads:
    """Reads consecutive rows that all ranks hold a share of, each rank its own, ``calls`` times on every rank.

    A rank that cannot read its share sends zeros in its place, and raises afterwards: the others wait for it.
    """

    def __init__(self, exchange: Exchange, fetch: Fetch, layout: RecordLayout, calls: int):
        self._exchange, self._fetch, self._layout, self._left = exchange, fetch, layout, calls

    def serve(self) -> None:
        """Take part in what other ranks still read. Raises at the end what it could not read."""
        failed: Exception | None = None
        while self._left:
            try:
                self(torch.empty(0, dtype=torch.int64))
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def __call__(self, rows: Tensor) -> Tensor:
        """Records of ``rows``, consecutive ones or none. Collective."""
        self._left -= 1
        bounds = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        wanted = [json.loads(told) for told in self._exchange.tell(json.dumps(bounds))]
        own = self._exchange.shard
        held = [own.of(first, last) for first, last in wanted]
        mine = [Shard(rank, own.ranks).of(*bounds) for rank in range(own.ranks)]
        come = [len(each) for each in mine]
        share, failed = self._share(torch.cat(held))
        found = swap(share, [len(each) for each in held], come, self._exchange.group)
        if failed is not None:
            raise failed
        records = torch.empty_like(found)
        records[torch.cat(mine).to(found.device) - bounds[0]] = found
        return records

    def _share(self, rows: Tensor) -> tuple[Tensor, Exception | None]:
        """What this rank holds of them, and why it does not."""
        try:
            return self._fetch(rows), None
        except Exception as error:
            return self._layout.empty(len(rows), self._exchange.device), error
