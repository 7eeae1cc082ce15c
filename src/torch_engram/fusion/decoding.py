"""A step of decoding after its matrix product: one position of every sequence, when the convolution has seen enough.

What an :class:`~torch_engram.fusion.engram.EngramState` holds is read where it lies, and the new position is written
there. The numbers are those of :meth:`torch_engram.fusion.Engram.fuse_naive`, sums taken in another order. On a CPU so
few are NumPy's, whose calls cost a fraction of PyTorch's. The Triton twin is in
:mod:`torch_engram.fusion.decode_kernels`.
Shapes: B batch, M branches, d hidden, k taps, L = (k-1)·dilation + 1 positions, the step's own last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_engram.fusion.gate import SMALLEST_SCORE
from torch_engram.kernels import use_kernels

if TYPE_CHECKING:
    from torch_engram.fusion.engram import Engram

Numbers = NDArray[np.float32]


def can_fuse_step(streams: Tensor) -> bool:
    """Whether there is a form for streams of this type, where they are."""
    return use_kernels(streams) or (streams.dtype == torch.float32 and streams.device.type == "cpu")


def fuse_step(
    engram: Engram,
    streams: Tensor,
    keys_value: Tensor,
    live: Tensor | None,
    doc_start: Tensor | None,
    normed: Tensor,
    age: Tensor,
) -> tuple[Tensor, Tensor]:
    """Streams with the memory added ``[B, 1, M, d]`` and gates fp32 ``[B, 1, M]``; without a graph.

    ``streams`` ``[B, 1, M, d]``; ``keys_value`` ``[B, 1, (M + 1) * d]``; ``live`` and ``doc_start`` bool ``[B, 1]``;
    ``normed`` ``[B, L, M, d]`` and ``age`` int64 ``[B, L]``, of the convolution's state: the last position of both is
    filled here.
    """
    if use_kernels(streams):
        from torch_engram.fusion.decode_kernels import fuse_step_triton

        return fuse_step_triton(engram, streams, keys_value, live, doc_start, normed, age)
    return fuse_step_numpy(engram, streams, keys_value, live, doc_start, normed, age)


def fuse_step_numpy(
    engram: Engram,
    streams: Tensor,
    keys_value: Tensor,
    live: Tensor | None,
    doc_start: Tensor | None,
    normed: Tensor,
    age: Tensor,
) -> tuple[Tensor, Tensor]:
    """See :func:`fuse_step`; streams are fp32 on a CPU."""
    style, convolution = engram.style, engram.convolution
    assert convolution is not None, "a step has what the convolution sees"
    branches, hidden = streams.shape[2:]
    h, x, ages = streams[:, 0].numpy(), normed.numpy(), age.numpy()
    keys_value_ = _array(keys_value).reshape(-1, branches + 1, hidden)
    keys, value = keys_value_[:, :-1], keys_value_[:, -1:]
    alpha = _gate(engram, h, keys)  # [B, M]
    if live is not None:
        alpha = alpha * live.numpy()
    u = alpha[..., None] * value
    x[:, -1] = u / _rms(u, style.conv_eps) * (_array(convolution.norm_weight) + style.weight_offset)
    ages[:, -1] = ages[:, -2] + 1 if doc_start is None else np.where(doc_start.numpy()[:, 0], 0, ages[:, -2] + 1)
    taps = _array(convolution.weight)  # [k, M, d]
    if not style.conv_crosses_documents and ages[:, -1].min(initial=convolution.reach) < convolution.reach:
        back = np.arange(convolution.reach, -1, -convolution.dilation)
        taps = taps * (ages[:, -1:] >= back)[:, :, None, None]
    z = np.add.reduce(x[:, :: convolution.dilation] * taps, axis=1)
    return torch.from_numpy(h + (u + z * _sigmoid(z)))[:, None], torch.from_numpy(alpha)[:, None]


def _gate(engram: Engram, h: Numbers, keys: Numbers) -> Numbers:
    """See :func:`torch_engram.fusion.gate.gate`; all is fp32, so that nothing is rounded on the way."""
    style = engram.style
    weight = (_array(engram.query_weight) + style.weight_offset) * (_array(engram.key_weight) + style.weight_offset)
    size = _rms(h, style.gate_eps) * _rms(keys, style.gate_eps)
    score = np.add.reduce(h * weight * keys, axis=-1) / (size[..., 0] * np.float32(h.shape[-1] ** 0.5))
    root = np.sqrt(np.maximum(np.abs(score), np.float32(SMALLEST_SCORE)))
    return _sigmoid(np.copysign(root, score) if style.copies_sign else root * np.sign(score))


def _rms(x: Numbers, eps: float) -> Numbers:
    """``[B, M, 1]`` of ``[B, M, d]``."""
    square = np.add.reduce(x * x, axis=-1, keepdims=True)
    size: Numbers = np.sqrt(square / np.float32(x.shape[-1]) + np.float32(eps))
    return size


def _sigmoid(x: Numbers) -> Numbers:
    with np.errstate(over="ignore"):  # of a number far below zero it is 0
        probability: Numbers = np.reciprocal(1 + np.exp(-x))
    return probability


def _array(tensor: Tensor) -> Numbers:
    array: Numbers = tensor.detach().float().numpy()
    return array
