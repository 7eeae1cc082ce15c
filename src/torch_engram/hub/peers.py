"""Other processes that train the same model: what its ``DistributedDataParallel`` says of a forward.

That class averages the gradients of weights in the backward of every forward but those within ``no_sync()``; rows do as
weights do. PyTorch has no public way to ask it from inside of a model, so whatever is private there is read here alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Peers:
    """The processes that a forward's gradients are averaged over."""

    group: ProcessGroup | None
    """None where there are other processes, and nothing that averages with them."""
    meet: bool
    """Whether they average in this forward's own backward, and not in a later one's of the step."""


def peers_of(name: str, weight: nn.Parameter) -> Peers | None:
    """Of the forward that is under way, whose model has memory ``name`` with ``weight``; None for a process alone.

    Raises ``ValueError`` where the processes would not end with the same memory, or wait for each other for ever.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    around = DistributedDataParallel._get_active_ddp_module()
    if around is None:
        return None if dist.get_world_size() == 1 else Peers(None, meet=False)
    if around.process_group.size() == 1:
        return None
    if all(weight is not known for known in around._module_parameters):
        raise ValueError(
            f"DistributedDataParallel does not know memory {name!r}: attach it before the model is wrapped."
        )
    if around._join_config.enable:
        raise ValueError(
            f"Rows of memory {name!r} are not trained within join(): give every rank as many batches, and leave it out."
        )
    return Peers(around.process_group, meet=around.require_backward_grad_sync)
