"""The ranks of a run: processes that train one model together, each on its own micro-batches.

:class:`Ranks` is a run of one process, which does everything itself and pays nothing for it; :class:`ProcessRanks` is
one rank of several. The loop asks them alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_engram.models import Decoder
from torch_engram.models.moe import MoE

if TYPE_CHECKING:
    from torch_engram.train.sharded import Rows

T = TypeVar("T")


class Ranks:
    """A run of one process."""

    rank, size = 0, 1
    group: dist.ProcessGroup | None = None
    rows: Rows | None = None
    """How matrices are divided; None where they are whole."""

    def __repr__(self) -> str:
        return f"Ranks({self.rank} of {self.size})"

    # -- what a run does once -----------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this rank prints, writes and keeps what all share."""
        return self.rank == 0

    def lead(self, act: Callable[[], T]) -> T | None:
        """``act()`` on the rank that leads, None elsewhere. All ranks wait for it, and raise what it raises."""
        return act()

    def first(self, act: Callable[[], T]) -> T:
        """``act()`` on every rank, once the one that leads has done it."""
        return act()

    def agree(self, value: T) -> T:
        """The value of the rank that leads."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag

    def device(self, kind: str) -> str:
        """The device of a kind, ``cpu`` or ``cuda``, that is this rank's: a thread's own may be another."""
        return kind

    # -- the network --------------------------------------------------------------------------------------------------

    def divide(self, decoder: Decoder) -> None:
        """Divide its parameters over the ranks, before anything holds on to them."""

    def begin_pass(self, decoder: Decoder, *, first: bool, last: bool) -> None:
        """Call it before each forward of a step: gradients are averaged over the ranks in the backward of the last."""

    def part_again(self, decoder: Decoder) -> None:
        """Call it after forwards that no backward follows."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        return value

    def clip(self, decoder: Decoder, rows: Iterable[nn.Parameter], limit: float, *, foreach: bool) -> Tensor:
        """Scale all gradients, those of all ranks' rows included, to a norm of ``limit`` at most; what it was."""
        return torch.nn.utils.clip_grad_norm_([*decoder.parameters(), *rows], limit, foreach=foreach)

    def sum_loads(self, decoder: Decoder) -> None:
        """Let every rank's experts have counted the tokens of all ranks."""

    def is_finite(self, decoder: Decoder) -> bool:
        """Whether all weights are."""
        return all(bool(weight.isfinite().all()) for weight in decoder.parameters())

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors on the rank that leads, nothing elsewhere."""
        return dict(tensors)

    def part_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """What this rank holds of a whole tensor that is divided as ``like``."""
        return tensor


class ProcessRanks(Ranks):
    """One of the processes of ``group``, whose collectives take tensors of the host and of ``device``."""

    def __init__(self, group: dist.ProcessGroup, device: str):
        from torch_engram.train import sharded

        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.rows = sharded.Rows(group)
        self._device, self._sharded = device, sharded
        self._leader = dist.get_global_rank(group, 0)

    def lead(self, act: Callable[[], T]) -> T | None:
        """See :class:`Ranks`."""
        result, error = None, None
        if self.leads:
            try:
                result = act()
            except Exception as raised:
                error = raised
        told = self.agree(error)
        if told is not None:
            raise told
        return result

    def first(self, act: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        led = self.lead(act)
        return cast(T, led) if self.leads else act()

    def agree(self, value: T) -> T:
        """See :class:`Ranks`."""
        told: list[Any] = [value]
        dist.broadcast_object_list(told, self._leader, group=self.group, device=torch.device("cpu"))
        agreed: T = told[0]
        return value if self.leads else agreed

    def any(self, flag: bool) -> bool:
        """See :class:`Ranks`."""
        return bool(self.sum(torch.tensor(int(flag))))

    def device(self, kind: str) -> str:
        """See :class:`Ranks`."""
        return f"cuda:{torch.cuda.current_device()}" if kind == "cuda" else kind

    def divide(self, decoder: Decoder) -> None:
        """See :class:`Ranks`."""
        assert self.group is not None
        self._sharded.divide(decoder, self.group, self._device)

    def begin_pass(self, decoder: Decoder, *, first: bool, last: bool) -> None:
        """See :class:`Ranks`."""
        self._sharded.begin_pass(decoder, first=first, last=last)

    def part_again(self, decoder: Decoder) -> None:
        """See :class:`Ranks`."""
        self._sharded.part_again(decoder)

    def sum(self, value: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        dist.all_reduce(value, group=self.group)
        return value

    def clip(self, decoder: Decoder, rows: Iterable[nn.Parameter], limit: float, *, foreach: bool) -> Tensor:
        """See :class:`Ranks`."""
        assert self.group is not None
        return self._sharded.clip(decoder.parameters(), rows, limit, self.group)

    def sum_loads(self, decoder: Decoder) -> None:
        """See :class:`Ranks`."""
        loads = [module.load for module in decoder.modules() if isinstance(module, MoE)]
        if loads:
            together = self.sum(torch.cat(loads))
            for load, total in zip(loads, together.split([len(load) for load in loads]), strict=True):
                load.copy_(total)

    def is_finite(self, decoder: Decoder) -> bool:
        """See :class:`Ranks`."""
        mine = all(bool(self._sharded.own(weight).isfinite().all()) for weight in decoder.parameters())
        return not self.any(not mine)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Ranks`."""
        return self._sharded.whole(tensors, keeps=self.leads)

    def part_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        return self._sharded.part_like(tensor, like)


ALONE = Ranks()


def ranks_of(group: dist.ProcessGroup | None, device: str) -> Ranks:
    """The ranks of ``group``, if there is one with several."""
    return ALONE if group is None or group.size() == 1 else ProcessRanks(group, device)


def launched_ranks() -> int:
    """How many ranks ``torchrun`` or ``engram train --nproc`` started; 1 for a process of its own."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[dist.ProcessGroup | None]:
    """The group of all ranks that this process was started among, on a GPU of its own; None where it is alone.

    Raises ``ValueError`` when there are more ranks than GPUs, or two have the same one.
    """
    if launched_ranks() == 1:
        yield None
        return
    if device == "cuda":
        torch.cuda.set_device(_own_gpu(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        every: list[Any] = [None] * dist.get_world_size()
        mine = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        dist.all_gather_object(every, mine, group=dist.new_group(backend="gloo"))
        require_different(every)
    yield dist.group.WORLD
    dist.all_reduce(torch.zeros(()))  # none leaves before the last one is here, or it might be taken for one that died
    dist.destroy_process_group()


def _own_gpu(local_rank: int, ranks: int) -> int:
    """The one that this process sees, where whoever started it gave each rank its own; or one of all."""
    if torch.cuda.device_count() == 1:
        return 0
    require_gpus(ranks)
    return local_rank


def require_gpus(ranks: int) -> None:
    """Raises ``ValueError`` when this machine has fewer GPUs than ranks."""
    there = torch.cuda.device_count()
    if ranks > there:
        raise ValueError(f"{ranks} ranks with device=cuda need a GPU each, and PyTorch sees {there}: start {there}.")


def require_different(gpus: Sequence[str]) -> None:
    """Raises ``ValueError`` when two ranks have the same GPU, by what each rank's is called."""
    first: dict[str, int] = {}
    for rank, gpu in enumerate(gpus):
        if first.setdefault(gpu, rank) != rank:
            raise ValueError(f"Ranks {first[gpu]} and {rank} see the same GPU alone: give each its own, or all to all.")
