"""Asking a table in host memory: kernels leave the places of missing rows in pinned memory, where the CPU finds them.

The first of them the GPU reads by itself, as many as :class:`~torch_engram.stores.host_reads.HostReads` has measured to
be best; the CPU gathers the others meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_engram.kernels import use_kernels
from torch_engram.stores.pinned import pinned
from torch_engram.stores.records import ROW_MASK, SPACE_SHIFT
from torch_engram.stores.slots import Found, Slots, fill_naive

if TYPE_CHECKING:
    from torch_engram.stores.host_reads import HostReads

SHARES = 256
"""What shares of a batch are counted in."""


class HostAsk:
    """See :class:`~torch_engram.stores.asks.Ask`: of up to ``capacity`` rows that a GPU misses.

    ``division``: what the GPU reads itself of a batch, so many rows and a share of the batch, of :data:`SHARES`. It
    stays as it is, since what is recorded of an ask has it in it.
    """

    def __init__(self, reads: HostReads, capacity: int, division: tuple[int, int]):
        self._ways, self.capacity, device = reads, capacity, reads.device
        self.records = torch.empty((capacity, reads.table.layout.nbytes), dtype=torch.uint8, device=device)
        self._division = division
        self.reads, self.alone = self.by_gpu(capacity) > 0, self.by_gpu(capacity) == capacity
        self._index = pinned((capacity,), torch.int64, device)
        self._head = pinned((2,), torch.int64, device).zero_()
        self._found = self._head.numpy()  # the same two: how many, and whether one of them is not there
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        self._beside: torch.cuda.Event | None = None

    def by_gpu(self, count: int) -> int:
        """How many of ``count`` rows, the first ones, the GPU reads itself."""
        first, share = self._division
        return 0 if self._ways.words is None else min(count, first + count * share // SHARES)

    def send(self, keys: Tensor, count: Tensor) -> None:
        """See :class:`~torch_engram.stores.asks.Ask`."""
        self._keys, self._count = keys, count
        if self.alone:  # there is nobody to be told
            return
        where = (self._ways.bases, self._ways.rows, self._index, self._head)
        if use_kernels(keys):
            from torch_engram.stores.ask_kernels import send_triton

            send_triton(keys, count, *where)
        else:
            send_naive(keys, count, *where)

    def sent(self) -> None:
        """See :class:`~torch_engram.stores.asks.Ask`."""
        if self._sent is not None:
            self._sent.record()

    def read(self) -> None:
        """See :class:`~torch_engram.stores.asks.Ask`."""
        reads = self._ways
        if reads.words is None or not self.reads:
            return
        table = (reads.words, self._keys, self._count, reads.bases, reads.rows, self._head)
        if use_kernels(self._keys):
            from torch_engram.stores.ask_kernels import read_triton

            read_triton(*table, *self._division, self.records)
        else:
            read_naive(*table, *self._division, self.records)

    def place(self, slots: Slots, found: Found) -> None:
        """See :class:`~torch_engram.stores.asks.Ask`."""
        reads = self._ways
        assert reads.words is not None and self.alone, "the host has rows to bring"
        table = (reads.words, self._keys, self._count, reads.bases, reads.rows, self._head)
        if use_kernels(self._keys):
            from torch_engram.stores.ask_kernels import place_triton

            place_triton(*table, self.records, slots, found)
        else:
            place_naive(*table, self.records, slots, found)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """See :class:`~torch_engram.stores.asks.Ask`."""
        stream = self._ways.beside
        if stream is None or self._sent is None:
            yield
            return
        stream.wait_event(self._sent)
        with torch.cuda.stream(stream):
            yield
        self._beside = stream.record_event()

    def bring(self) -> Tensor:
        """See :class:`~torch_engram.stores.asks.Ask`. Raises ``ValueError`` naming a row or a space that is not
        there."""
        if self.alone:
            self._wait_for_read()  # first, since who gives up after an error looks at what was found
            self.check()
            return self.records
        self.wait()
        count = int(self._found[0])
        by_gpu = self.by_gpu(count)
        if by_gpu < count:
            table, index, out = self._ways.records, self._index[by_gpu:count], self.records[by_gpu:count]
            self._ways.staging.move(table, index, out, self._sent)
        self._wait_for_read()
        return self.records[:count]

    def _wait_for_read(self) -> None:
        if self._beside is not None:
            torch.cuda.current_stream(self._ways.device).wait_event(self._beside)
            self._beside = None

    def wait(self) -> None:
        """See :class:`~torch_engram.stores.asks.Ask`. Raises ``ValueError`` naming a row or a space that is not there;
        where the device is :attr:`alone`, it has to have read them before."""
        if self._sent is not None:
            self._sent.synchronize()
        self.check()

    def check(self) -> None:
        """See :class:`~torch_engram.stores.asks.Ask`."""
        if self._found[1]:
            self._found[1] = 0
            self._ways.table.checked_index(self._keys[: int(self._found[0])].cpu())
            raise ValueError("A row that was asked for is not in the table: is the configuration the table's?")


def send_naive(keys: Tensor, count: Tensor, bases: Tensor, rows: Tensor, index: Tensor, head: Tensor) -> None:
    """Put the places in the table of the first ``count`` of ``keys`` int64 ``[capacity]`` in ``index``, -1 for a row
    that is not there, and ``count`` in ``head[0]``; ``head[1]`` becomes 1 where a row was not there.

    ``bases``, ``rows``: int64 by space, where its rows begin and how many it has; 0 for one that is not there.
    """
    wanted = keys[: int(count[0])]
    at, known = _located(wanted, bases, rows)
    index[: len(wanted)] = torch.where(known, at, -1)
    head[0] = len(wanted)
    if not known.all():
        head[1] = 1


def read_naive(
    words: Tensor, keys: Tensor, count: Tensor, bases: Tensor, rows: Tensor, head: Tensor, first: int, share: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Put wanted rows in ``out`` uint8 ``[capacity, nbytes]``: the first ones, ``first`` of them and ``share`` of
    :data:`SHARES`. ``words``: int64, the table. ``head``: as for :func:`send_naive`."""
    many = int(count[0])
    at, known = _located(keys[: min(many, first + many * share // SHARES)], bases, rows)
    head[0] = many
    if not known.all():
        head[1] = 1
    out[: len(at)][known] = words[at[known].to(words.device)].view(torch.uint8).to(out.device)


def place_naive(
    words: Tensor, keys: Tensor, count: Tensor, bases: Tensor, rows: Tensor, head: Tensor, out: Tensor, slots: Slots,
    found: Found,
) -> None:  # fmt: skip
    """Put all wanted rows where ``found`` says that they belong, and in ``out``, of which only those without a place
    are looked at. Arguments as for :func:`read_naive`."""
    read_naive(words, keys, count, bases, rows, head, len(keys), 0, out)
    fill_naive(slots, found, out)


def _located(keys: Tensor, bases: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    space, row = keys >> SPACE_SHIFT, keys & ROW_MASK
    known = (space >= 0) & (space < len(rows))
    space = space.where(known, 0)
    return bases[space] + row, known & (row < rows[space])
