"""An Engram's weights as Qwen4Exp's PLE layers have them: two projections, three norms and a depthwise convolution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_engram.config import EngramConfig
from torch_engram.fusion import Engram

_FLOATS = ("F32", "BF16", "F16")


def kinds(config: EngramConfig) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Types and shape of every tensor of a layer but its embedding's."""
    streams = config.branches * config.hidden
    shapes = {
        "key_proj.weight": (streams, config.embedding_dim),
        "value_proj.weight": (config.hidden, config.embedding_dim),
        "norm_key.weight": (streams,),
        "norm_query.weight": (streams,),
        "norm_conv.weight": (streams,),
        "conv1d.weight": (streams, 1, config.conv_kernel),
    }
    return {name: (_FLOATS, shape) for name, shape in shapes.items()}


@torch.no_grad()
def filled(config: EngramConfig, stored: Mapping[str, Tensor]) -> Engram:
    """An Engram in fp32 with the weights of one layer."""
    engram, shape = Engram(config), (config.branches, config.hidden)
    assert engram.convolution is not None
    engram.wkv.weight.copy_(torch.cat((stored["key_proj.weight"], stored["value_proj.weight"])))
    engram.key_weight.copy_(stored["norm_key.weight"].view(shape))
    engram.query_weight.copy_(stored["norm_query.weight"].view(shape))
    engram.convolution.norm_weight.copy_(stored["norm_conv.weight"].view(shape))
    engram.convolution.weight.copy_(stored["conv1d.weight"].view(*shape, -1).permute(2, 0, 1))
    return engram


@torch.no_grad()
def to_store(engram: Engram) -> dict[str, Tensor]:
    """The tensors of one layer, in their own types."""
    convolution = engram.convolution
    assert convolution is not None
    keys, value = engram.wkv.weight.split((engram.config.branches * engram.config.hidden, engram.config.hidden))
    taps = convolution.weight.permute(1, 2, 0)  # oldest first, as ours
    return {
        "key_proj.weight": keys,
        "value_proj.weight": value,
        "norm_key.weight": engram.key_weight.flatten(),
        "norm_query.weight": engram.query_weight.flatten(),
        "norm_conv.weight": convolution.norm_weight.flatten(),
        "conv1d.weight": taps.flatten(0, 1).unsqueeze(1),
    }
