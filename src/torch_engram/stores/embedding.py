"""Encoded records to the embeddings that read them, in one pass: gather, dequantise, and scatter to the positions.

The numbers are those of :mod:`torch_engram.stores.codecs` to the last bit, rounded once to the embeddings' type. The
Triton twin is in :mod:`torch_engram.stores.embedding_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_engram.kernels import use_kernels
from torch_engram.stores.codecs import CODECS
from torch_engram.stores.records import RecordLayout
from torch_engram.stores.slots import pick


@dataclass(frozen=True)
class Columns:
    """Of every column of a position: which of the position's entries it is in, and as which of its records."""

    group: Tensor
    """int64 ``[C]``."""
    part: Tensor
    """int64 ``[C]``."""
    groups: int
    """Entries of a position."""

    @classmethod
    def of(cls, parts: Sequence[int], device: torch.device) -> Columns:
        """Columns of entries of ``parts`` records, one after the other."""
        pairs = [(group, part) for group, many in enumerate(parts) for part in range(many)]
        # made on the host: when the copy returns they are there, for any stream
        group, part = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).t().contiguous().to(device)
        return cls(group, part, len(parts))


def embed(
    layout: RecordLayout, records: Tensor, fetched: Tensor, where: Tensor, columns: Columns, out: Tensor
) -> Tensor:
    """Values of the rows of ``n`` positions of ``S`` spaces, in ``out`` ``[S, n, C·dim]``; returns ``out``.

    ``where``: int64 ``[S·n·groups]``: i, an entry's first record in ``records`` uint8 ``[R, nbytes]``, or -2 - i, its
    first in ``fetched`` uint8 ``[k, nbytes]``. Positions of ``out`` may be any distance apart, their numbers lie side
    by side.
    """
    if use_kernels(where):
        from torch_engram.stores.embedding_kernels import embed_triton

        return embed_triton(layout, records, fetched, where, columns, out)
    return embed_naive(layout, records, fetched, where, columns, out)


def embed_naive(
    layout: RecordLayout, records: Tensor, fetched: Tensor, where: Tensor, columns: Columns, out: Tensor
) -> Tensor:
    """See :func:`embed`."""
    first = where.view(-1, columns.groups)[:, columns.group]
    index = torch.where(first < 0, first - columns.part, first + columns.part)
    read = pick(records, fetched, index.flatten())
    fields = (field for field in layout.fields if field.plane == "value")
    values = CODECS[layout.plane("value").codec].decode(tuple(layout.view(read, field) for field in fields))
    return out.copy_(values.view(out.shape))
