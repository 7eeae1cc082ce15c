"""Attention of one new token of each of B sequences over keys and values of their own lengths, and the feed-forward's
activation, in PyTorch's own operators; on a GPU each is one kernel (:mod:`decoding.kernels`).

Shapes: B sequences, H query heads, G key (and value) heads, D width of a head, S positions of all sequences together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_engram.kernels import use_kernels
from torch_engram.models.rotary import rotate

EPS = 1e-6


class RaggedCache:
    """Keys and values of every layer, ``[S, G, 2, D]`` each, random: a stretch for each sequence, long enough for its
    first ``lengths`` and ``room`` more positions."""

    def __init__(
        self, lengths: Sequence[int], room: int, layers: int, groups: int, width: int, device: torch.device,
        dtype: torch.dtype,
    ):  # fmt: skip
        self.positions = max(lengths) + room
        """Of the longest sequence."""
        slots = torch.tensor(lengths) + room
        self.starts = (slots.cumsum(0) - slots).to(device)
        self._first = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.lengths = self._first.clone()
        size = (int(slots.sum()), groups, 2, width)
        self.layers = [torch.empty(size, device=device, dtype=dtype).normal_() for _ in range(layers)]

    def reset(self) -> None:
        """Every sequence is as long as at first."""
        self.lengths.copy_(self._first)

    def bytes_read(self, steps: int) -> float:
        """Of keys and values by one step, the mean over ``steps`` of them from the first lengths on."""
        one = sum(cells[0].numel() * cells.element_size() for cells in self.layers)
        return one * (float(self._first.sum()) + len(self._first) * (steps - 1) / 2)


def attend(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, cache: RaggedCache, layer: int
) -> Tensor:
    """Attention ``[B, H * D]`` of new tokens over those before them and themselves.

    ``qkv`` ``[B, (H + 2G) * D]``: queries and keys are normed, scaled by ``query_norm`` and ``key_norm`` ``[D]`` and
    turned by the angles of their place, ``cos`` and ``sin`` fp32 ``[positions, D / 2]``. New keys and values go into
    the cache, whose lengths stay.
    """
    cells, starts, lengths = cache.layers[layer], cache.starts, cache.lengths
    if use_kernels(qkv):
        from decoding.kernels import attend_triton

        return attend_triton(qkv, query_norm, key_norm, cos, sin, cells, starts, lengths)
    return attend_naive(qkv, query_norm, key_norm, cos, sin, cells, starts, lengths)


def attend_naive(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, cells: Tensor, starts: Tensor,
    lengths: Tensor,
) -> Tensor:  # fmt: skip
    """:func:`attend`, one sequence after the other."""
    groups, width = cells.shape[1], cells.shape[3]
    out = []
    for new, start, length in zip(qkv.unflatten(1, (-1, width)), starts.tolist(), lengths.tolist(), strict=True):
        heads = len(new) - 2 * groups
        turned = F.rms_norm(new[:-groups].float(), (width,), eps=EPS)
        turned = turned * torch.cat((query_norm.expand(heads, -1), key_norm.expand(groups, -1)))
        query, key = rotate(turned, cos[length], sin[length]).to(new.dtype).split((heads, groups))
        cells[start + length, :, 0], cells[start + length, :, 1] = key, new[-groups:]
        keys, values = cells[start : start + length + 1].unbind(2)  # [positions, G, D]
        scores = torch.einsum("gqd,tgd->gqt", query.unflatten(0, (groups, -1)).float(), keys.float()) * width**-0.5
        out.append(torch.einsum("gqt,tgd->gqd", scores.softmax(-1), values.float()).flatten())
    return torch.stack(out).to(qkv.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[B, n]`` from ``[B, 2n]``."""
    if use_kernels(gate_up):
        from decoding.kernels import swiglu_triton

        return swiglu_triton(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
