"""Rows of a table in host memory, gathered side by side by torch's threads, without the GIL.

dev/experiments/host_gather.py compares this with other ways.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(table: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Fill ``out`` ``[U, nbytes]`` with the rows ``index`` int64 ``[U]`` of ``table`` ``[rows, nbytes]``; returns it.

    Tables and results are contiguous uint8 on the CPU, and ``nbytes`` is a multiple of 8. Raises ``IndexError`` for a
    row that is not there.
    """
    word = torch.complex128 if table.shape[1] % 16 == 0 else torch.int64  # the widest that divides a row
    torch.index_select(table.view(word), 0, index, out=out.view(word))
    return out
