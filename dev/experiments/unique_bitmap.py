"""Distinct ids of a step without a sort: one bit for every row of the table, against ``unique_rows``.

    python dev/experiments/unique_bitmap.py      # TRITON_INTERPRET=1 where there is no CUDA device: checks, no timings

Every read sets its row's bit; a running sum of the words' set bits, plus the set bits below a row's own in its word, is
the row's place among the distinct ids. What this does not give is the reads sorted by row, which merging gradients
needs: a step that trains would still sort, a step that only reads would not. The bitmap costs a bit for every row of
the table, cleared and read once a step.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.bench.memory_ops import natural_ids
from torch_engram.bench.timing import median, milliseconds
from torch_engram.memory.segments import unique_rows

WORDS, IDS = 1024, 1024


def unique_bitmap(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Distinct ids ascending int64 ``[U]``, and the place among them of every id, int64 ``[n]``; ids below ``rows``."""
    words = triton.cdiv(rows, 32)
    blocks = triton.cdiv(words, WORDS)
    bits = torch.zeros(words, dtype=torch.int32, device=ids.device)
    below = torch.empty(words, dtype=torch.int32, device=ids.device)
    counts = torch.empty(blocks, dtype=torch.int64, device=ids.device)
    grid = (triton.cdiv(len(ids), IDS),)
    _set[grid](ids, bits, len(ids), IDS=IDS)
    _count[(blocks,)](bits, counts, words, WORDS=WORDS)
    upto = counts.cumsum(0)
    distinct = torch.empty(int(upto[-1]), dtype=torch.int64, device=ids.device)
    _sum_below[(blocks,)](bits, counts, upto, below, words, WORDS=WORDS)
    inverse = torch.empty_like(ids)
    _place[grid](ids, bits, below, distinct, inverse, len(ids), IDS=IDS)
    return distinct, inverse


@triton.jit
def _set_bits(x):
    """How many bits of each int32 are set. The masks drop what the shifts bring in from the sign."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@triton.jit
def _bit_of(ids, IDS: tl.constexpr):
    return tl.full([IDS], 1, tl.int32) << (ids & 31).to(tl.int32)


@triton.jit
def _set(ids, bits, count, IDS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    row = tl.load(ids + at, mask=at < count, other=0)
    bit = _bit_of(row, IDS)
    there = tl.load(bits + row // 32, mask=at < count, other=0) & bit  # a row that is read often is not contended for
    tl.atomic_or(bits + row // 32, bit, mask=(at < count) & (there == 0))


@triton.jit
def _count(bits, counts, words, WORDS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * WORDS + tl.arange(0, WORDS)
    tl.store(counts + block, tl.sum(_set_bits(tl.load(bits + at, mask=at < words, other=0)), axis=0).to(tl.int64))


@triton.jit
def _sum_below(bits, counts, upto, below, words, WORDS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * WORDS + tl.arange(0, WORDS)
    here = _set_bits(tl.load(bits + at, mask=at < words, other=0))
    before = tl.load(upto + block) - tl.load(counts + block)
    tl.store(below + at, (before + tl.cumsum(here, axis=0) - here).to(tl.int32), mask=at < words)


@triton.jit
def _place(ids, bits, below, distinct, inverse, count, IDS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    row = tl.load(ids + at, mask=at < count, other=0)
    lower = tl.load(bits + row // 32, mask=at < count, other=0) & (_bit_of(row, IDS) - 1)
    place = (tl.load(below + row // 32, mask=at < count, other=0) + _set_bits(lower)).to(tl.int64)
    tl.store(inverse + at, place, mask=at < count)
    tl.store(distinct + place, row, mask=at < count)  # every read of a row stores the same


def check(ids: Tensor, rows: int) -> None:
    distinct, inverse = unique_bitmap(ids, rows)
    wanted, _, segments = unique_rows(ids, rows)
    assert torch.equal(distinct, wanted) and torch.equal(inverse, segments.inverse)


def main() -> None:
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        for reads, rows in ((1, 1), (300, 70), (3000, 100_003)):
            check(natural_ids(reads, rows, torch.device("cpu")), rows)
        print("equal to unique_rows")
        return
    print(torch.cuda.get_device_name(), torch.__version__)
    reads = 2**20
    for rows in (1_000_000, 10_000_000, 300_000_000):
        ids = natural_ids(reads, rows, torch.device("cuda"))
        check(ids, rows)
        for name, function in (("sort", unique_rows), ("bitmap", unique_bitmap)):
            took = median(milliseconds(partial(function, ids, rows)))
            print(f"{reads:,} reads of {rows:,}: {name:6} {took:8.3f} ms", flush=True)


if __name__ == "__main__":
    main()
