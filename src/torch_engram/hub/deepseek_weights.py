"""An Engram's weights as DeepSeek-V4.1 stores them: ``wkv`` in FP8 with a scale for 32x32, two norm weights in bf16.

``wkv`` has the key blocks first and the value last, as ours. Of the norm weights only the product counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_engram.config import EngramConfig
from torch_engram.fusion import Engram
from torch_engram.stores.codecs import Float8

SIDE = 32
_SQUARES = Float8(SIDE * SIDE)
"""The rows' codec, for a block of the matrix as one row."""


def kinds(config: EngramConfig) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Type and shape of every tensor of a layer but its table's."""
    height, width = (config.branches + 1) * config.hidden, config.embedding_dim
    norm = (("BF16",), (config.branches, config.hidden))
    return {
        "wkv.weight": (("F8_E4M3",), (height, width)),
        "wkv.scale": (("F8_E8M0",), (height // SIDE, width // SIDE)),
        "q_weight": norm,
        "k_weight": norm,
    }


@torch.no_grad()
def filled(config: EngramConfig, stored: Mapping[str, Tensor]) -> Engram:
    """An Engram in fp32 with the weights of one layer."""
    engram = Engram(config)
    engram.wkv.weight.copy_(dequantise(stored["wkv.weight"], stored["wkv.scale"]))
    engram.query_weight.copy_(stored["q_weight"])
    engram.key_weight.copy_(stored["k_weight"])
    return engram


@torch.no_grad()
def to_store(engram: Engram, near: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of one layer. ``near``: those of another checkpoint, whose ``wkv`` is taken over if it is the same.

    That matters for its bytes alone: a block whose largest code is 224 is one of 448 under half the scale.
    """
    weight = engram.wkv.weight.detach().cpu()
    if near is not None and torch.equal(dequantise(near["wkv.weight"], near["wkv.scale"]).to(weight.dtype), weight):
        codes, scale = near["wkv.weight"], near["wkv.scale"]
    else:
        codes, scale = quantise(weight)
    query, key = norm_weights(engram.query_weight.detach().cpu(), engram.key_weight.detach().cpu())
    return {"wkv.weight": codes, "wkv.scale": scale, "q_weight": query, "k_weight": key}


def norm_weights(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both in bf16, the second such that their product is rounded once, and not twice; what bf16 holds stays."""
    rounded = query.to(torch.bfloat16)
    rest = query.double() * key.double() / rounded.double()
    return rounded, torch.where(rounded == 0, key.double(), rest).to(torch.bfloat16)


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes E4M3 ``[r, k]`` and scales E8M0 ``[r/32, k/32]`` of ``[r, k]``, both multiples of 32."""
    rows, columns = matrix.shape
    codes, scale = _SQUARES.encode(_cut(matrix.float()))
    joined = _join(codes.view(torch.uint8), rows, columns).view(torch.float8_e4m3fn)
    return joined, scale.view(rows // SIDE, columns // SIDE)


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """Inverse of :func:`quantise`, fp32."""
    squares = _cut(codes.view(torch.uint8)).view(torch.float8_e4m3fn)
    return _join(_SQUARES.decode((squares, scale.reshape(-1, 1))), *codes.shape)


def _cut(matrix: Tensor) -> Tensor:
    """``[r, k]`` to one row a block, ``[r/32 * k/32, 1024]``."""
    rows, columns = matrix.shape
    tiles = matrix.reshape(rows // SIDE, SIDE, columns // SIDE, SIDE)
    return tiles.transpose(1, 2).reshape(-1, SIDE * SIDE)


def _join(squares: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of :func:`_cut`."""
    tiles = squares.view(rows // SIDE, columns // SIDE, SIDE, SIDE)
    return tiles.transpose(1, 2).reshape(rows, columns)
