"""A network divided over ranks by FSDP2, as tensors: a rank's own parts, whole ones for a checkpoint, their gradients.

Every parameter is a ``DTensor`` that is cut along its first dimension. What is here is met by runs of several ranks
only, and so is the import of :mod:`torch.distributed.fsdp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from torch_engram.models import Decoder


def divide(decoder: Decoder, group: dist.ProcessGroup, device: str) -> None:
    """Divide the parameters over the ranks of ``group``, block by block; what is in no block is a unit of its own.

    That unit stays whole from the decoder's forward until its backward is done, for the loss reads the head's weight
    outside. Every rank's decoder has the same weights. Gradients come out averaged over the ranks.
    """
    mesh = DeviceMesh.from_group(group, device)
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=False)


def begin_pass(decoder: Decoder, *, first: bool, last: bool) -> None:
    """Say which of a step's passes, forward and backward, comes next: the last one averages gradients over the ranks.

    Until then gradients are whole on every rank, and so are the parameters: ranks send them once a step. A step of one
    pass has a block's parameters whole only while it needs them.
    """
    assert isinstance(decoder, FSDPModule)
    decoder.set_requires_gradient_sync(last)
    decoder.set_reshard_after_backward(last)
    for block in decoder.blocks:
        assert isinstance(block, FSDPModule)
        block.set_reshard_after_forward(first and last)


def part_again(decoder: Decoder) -> None:
    """Let go of what a forward without a backward has left whole."""
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own(tensor: Tensor) -> Tensor:
    """The part of this rank, or a tensor that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], keeps: bool) -> dict[str, Tensor]:
    """The whole tensors in host memory, one after the other, on ranks that keep them; elsewhere none. Collective."""
    found = {}
    for name, tensor in tensors.items():
        every = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keeps:
            found[name] = every.cpu()
    return found


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor that every rank has this one's part, if ``like`` is divided: as that is."""
    if not isinstance(like, DTensor):
        return tensor
    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def clip(
    parameters: Iterable[nn.Parameter], rows: Iterable[nn.Parameter], limit: float, group: dist.ProcessGroup
) -> Tensor:
    """Scale the gradients of divided parameters and of all ranks' rows to a norm of ``limit``, if it is larger.

    Returns what it was, a scalar. Each number counts once, on the rank that holds it.
    """
    grads = [own(each.grad) for each in (*parameters, *rows) if each.grad is not None]
    total = torch.stack(torch._foreach_norm(grads)).square().sum()
    dist.all_reduce(total, group=group)
    norm = total.sqrt()
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


class Rows:
    """Matrices ``[rows, columns]`` that the ranks of ``group`` hold by rows: each a chunk, the last perhaps none."""

    def __init__(self, group: dist.ProcessGroup):
        self._group, self._rank, self._ranks = group, group.rank(), group.size()

    def held(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a divided tensor."""
        return own(tensor)

    def own(self, matrix: Tensor) -> Tensor:
        """The rows of this rank in a whole matrix, a view."""
        chunk = -(-len(matrix) // self._ranks)
        return matrix[self._rank * chunk : (self._rank + 1) * chunk]

    def gather(self, parts: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """The whole matrices, of so many ``rows``, of which every rank gives a part; all cross at once. Collective."""
        chunks = [-(-count // self._ranks) for count in rows]
        padded = [F.pad(part, (0, 0, 0, chunk - len(part))) for part, chunk in zip(parts, chunks, strict=True)]
        sent = torch.cat([part.flatten() for part in padded])
        found = [torch.empty_like(sent) for _ in range(self._ranks)]
        dist.all_gather(found, sent, group=self._group)
        cut = torch.stack(found).split([part.numel() for part in padded], dim=1)
        return [each.reshape(-1, part.shape[1])[:count] for each, part, count in zip(cut, padded, rows, strict=True)]
