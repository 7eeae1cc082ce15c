"""Ranks that each keep all rows of a memory, and take every step together.

A read asks nobody, so each rank evaluates and generates as it likes. In a step every rank says which rows it read and
takes in those of the others; the gradients of all of them are averaged. So the ranks take one step, the same to the
last bit, and rows that were alike stay so without ever being sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from torch_engram.memory.rows import TouchedRows


def average(name: str, tables: Sequence[TouchedRows], group: dist.ProcessGroup, state: int) -> None:
    """Let a step touch what any rank of ``group`` touches, with the mean of all ranks' gradients.

    ``tables``: of the memory ``name``, in the same order on every rank. ``state``: from 0 to below 2⁶³, the same on
    ranks that have the same rows. Collective. Raises ``ValueError``, and on every rank, where it is not the same.
    """
    own = torch.cat([touched.keys for touched in tables])
    keys = _of_all_ranks(name, own, group, state).unique()
    for touched in tables:
        touched.take_in(keys[touched.holds(keys)])
        grad = touched.total_grad()
        dist.all_reduce(grad, group=group)
        grad.div_(group.size())


def _of_all_ranks(name: str, own: Tensor, group: dist.ProcessGroup, state: int) -> Tensor:
    """The keys of every rank, int64, from those of this one."""
    ranks = range(group.size())
    head = torch.tensor([state, len(own)], device=own.device)
    heads = [torch.empty_like(head) for _ in ranks]
    dist.all_gather(heads, head, group=group)
    states, counts = torch.stack(heads).T.tolist()
    for rank in ranks:
        if states[rank] != states[0]:
            raise ValueError(
                f"Rank {rank} has other rows of memory {name!r} than rank 0, or has taken other steps: attach or load "
                "the same on every rank, and let each take every step."
            )
    longest = max(counts)  # every rank sends as many
    sent = torch.cat((own, own.new_zeros(longest - len(own))))
    found = [torch.empty_like(sent) for _ in ranks]
    dist.all_gather(found, sent, group=group)
    return torch.cat([keys[:count] for keys, count in zip(found, counts, strict=True)])
