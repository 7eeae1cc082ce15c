"""What others do: a plain Triton kernel that reads a table's rows out of pinned memory by their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.bench.timing import median, milliseconds
from torch_engram.stores.pages import private_memory, require_room
from torch_engram.stores.pinned import register

SHAPES = ((1, 1), (4, 4), (16, 4), (16, 8))
"""Rows and warps of a program; the quickest is taken."""


@triton.jit(do_not_specialize=["rows"])
def _read_rows(
    table, index, out, rows, STRIDE: tl.constexpr, WORDS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr
):
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = tl.arange(0, SPAN)
    row = tl.load(index + number, mask=number < rows, other=0)
    here = (number < rows)[:, None] & (word < WORDS)[None, :]
    found = tl.load(table + row[:, None] * STRIDE + word[None, :], mask=here)
    tl.store(out + number[:, None] * WORDS + word[None, :], found, mask=here)


def read_rows(table: Tensor, index: Tensor, out: Tensor, shape: tuple[int, int]) -> None:
    """The first ``w`` words of the rows ``index`` int64 ``[U]`` of ``table`` int64 ``[rows, words]``, which a GPU can
    read, into ``out`` int64 ``[U or more, w]`` on the GPU."""
    rows, warps = shape
    width = out.shape[1]
    _read_rows[(triton.cdiv(len(index), rows),)](
        table, index, out, len(index), STRIDE=table.shape[1], WORDS=width, SPAN=triton.next_power_of_2(width),
        ROWS=rows, num_warps=warps,
    )  # fmt: skip


def pinned_table(rows: int, words: int) -> Tensor:
    """Zeros int64 ``[rows, words]`` in pinned memory. Raises ``MemoryError`` or ``RuntimeError`` when there is none."""
    size = rows * words * 8
    require_room(size)
    memory = private_memory(size)
    table = torch.from_numpy(memory).view(torch.int64).view(rows, words).zero_()
    register(table, memory)
    return table


class PinnedReads:
    """The kernel on one table int64 ``[rows, words]``, of which ``width`` words a row hold something; ``most``: rows at
    once; ``device``: the GPU."""

    def __init__(self, table: Tensor, width: int, most: int, device: torch.device):
        self._table = table
        self._out = torch.empty(most, width, dtype=torch.int64, device=device)
        self._shape = SHAPES[0]

    def choose(self, index: Tensor) -> None:
        """Take the shape that reads these rows quickest."""
        times = {}
        for shape in SHAPES:
            self._shape = shape
            times[shape] = median(self.milliseconds([index] * 3))
        self._shape = min(times, key=lambda shape: times[shape])
        print(f"rows and warps of a program: {times}, so {self._shape}", flush=True)

    def milliseconds(self, indices: Sequence[Tensor]) -> list[float]:
        """Of reading the rows of each but the first, which warms up."""
        waiting = iter(indices)
        return milliseconds(
            lambda: read_rows(self._table, next(waiting), self._out, self._shape), len(indices) - 1, 1, self._out.device
        )
