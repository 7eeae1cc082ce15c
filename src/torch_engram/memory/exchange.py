"""What ranks send each other of the rows that a step touches: ids ahead of it, then rows, then their gradients.

Every row crosses to a rank that reads it once, however often it reads it, and its gradient once back. All calls are
collective: every rank makes them in the same order. Ids cross between hosts, by gloo, for a prefetch runs beside the
step: on GPUs that would be a second communicator, and two that wait for other ranks at once may wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from torch_engram.stores import Shard

_KINDS = OSError, ValueError
"""Errors that whoever reads them can mend."""
_GIVEN_UP = -1
"""In place of how many rows a rank asks for."""


class Exchange:
    """The ranks of ``group`` among which a memory's rows are divided. Making one is collective, too."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        ranks = dist.get_process_group_ranks(group)
        self.shard = Shard(group.rank(), group.size())
        self.device, self.group = device, group
        """For what the step itself does."""
        self._ahead = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)

    def route(self, rows: Tensor) -> Route:
        """Ask for distinct ``rows`` int64 ``[U]`` of one table where they are held. Waits for the device.

        Raises ``ValueError`` naming a rank that gave up.
        """
        owners = self.shard.owners(rows)
        order = owners.argsort(stable=True)
        asks = torch.bincount(owners, minlength=self.shard.ranks).cpu()
        sent, come = asks.tolist(), self._told(asks).tolist()
        if _GIVEN_UP in come:
            raise ValueError(f"Rank {come.index(_GIVEN_UP)} found no rows for this step, and says why where it runs.")
        own = self.shard.own_number(rows)[order].cpu()
        return Route(self.group, order, sent, come, swap(own, sent, come, self._ahead).to(rows.device))

    def give_up(self) -> None:
        """In place of :meth:`route`, where there is nothing to ask for: all ranks then raise, and none waits."""
        self._told(torch.full((self.shard.ranks,), _GIVEN_UP))

    def _told(self, each: Tensor) -> Tensor:
        """One number of every rank for this one, int64 ``[ranks]``, against ``each`` of this one's for the others."""
        told = torch.empty_like(each)
        dist.all_to_all_single(told, each, group=self._ahead)
        return told

    def norm(self, own: Tensor) -> Tensor:
        """The norm of what all ranks hold from that of what this one does, a scalar."""
        total = own.square()
        dist.all_reduce(total, group=self.group)
        return total.sqrt_()

    def sum(self, own: Tensor) -> Tensor:
        """The sum over the ranks, each time in the same order."""
        every = [torch.empty_like(own) for _ in range(self.shard.ranks)]
        dist.all_gather(every, own.contiguous(), group=self.group)
        return torch.stack(every).sum(0)

    def tell(self, text: str) -> list[str]:
        """What every rank tells."""
        mine = torch.frombuffer(bytearray(text.encode() + b"."), dtype=torch.uint8).to(self.device)  # never empty
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.shard.ranks)]
        dist.all_gather(sizes, torch.full_like(sizes[0], len(mine)), group=self.group)
        longest = max(int(size) for size in sizes)
        every = [mine.new_zeros(longest) for _ in sizes]
        dist.all_gather(every, torch.cat((mine, mine.new_zeros(longest - len(mine)))), group=self.group)
        told = zip(every, sizes, strict=True)
        return [bytes(text[: int(size) - 1].cpu().numpy()).decode() for text, size in told]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises within, all raise at its end: none waits for one that gave up. Whoever gives up has to
        take part to the end in what is collective."""
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        kind = next((kind for kind in _KINDS if isinstance(mine, kind)), RuntimeError)
        reasons = self.tell("" if mine is None else f"{kind.__name__}:{mine}")
        if mine is not None:
            raise mine
        for rank, reason in enumerate(reasons):
            name, _, text = reason.partition(":")
            if name:
                raise {each.__name__: each for each in (*_KINDS, RuntimeError)}[name](f"Rank {rank} gave up: {text}")

    def all(self, mine: bool) -> bool:
        """Whether it is so on every rank."""
        return all(self.tell("x" if mine else ""))


class Route:
    """The way of one table's rows in one step, between the ranks that hold them and those that read them.

    ``order``: int64 ``[U]``, the rows that this rank reads, sorted by the rank that holds them. ``asked``: int64
    ``[R]``, what each rank in turn reads of this one's rows, as this one numbers them.
    """

    def __init__(
        self, group: dist.ProcessGroup, order: Tensor, sent: Sequence[int], come: Sequence[int], asked: Tensor
    ):
        self._group, self.order, self._sent, self._come, self.asked = group, order, sent, come, asked

    def answer(self, values: Tensor) -> Tensor:
        """Rows ``[R, dim]`` that the ranks asked for to them; the rows ``[U, dim]`` that this one asked for."""
        found = swap(values, self._come, self._sent, self._group)
        rows = torch.empty_like(found)
        rows[self.order] = found
        return rows

    def give(self, grads: Tensor) -> Tensor:
        """Gradients ``[U, dim]`` of the rows that this rank read to those that hold them; ``[R, dim]`` of its own."""
        return swap(grads[self.order], self._sent, self._come, self._group)


def swap(rows: Tensor, sent: Sequence[int], come: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """``sent[r]`` of ``rows`` ``[n, …]``, in order, to rank r; ``come[r]`` from it."""
    found = rows.new_empty(sum(come), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), list(come), list(sent), group=group)
    return found
