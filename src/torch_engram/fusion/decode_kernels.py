"""The Triton twin of :mod:`torch_engram.fusion.decoding`: a step of decoding by one launch.

A program takes one branch of one sequence, all its channels together. Places in the state are int64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.fusion.forward_kernels import SMALLEST_SCORE, rounded, sigmoid

if TYPE_CHECKING:
    from torch_engram.fusion.engram import Engram

_CHANNELS_A_WARP = 256


def fuse_step_triton(
    engram: Engram,
    streams: Tensor,
    keys_value: Tensor,
    live: Tensor | None,
    doc_start: Tensor | None,
    normed: Tensor,
    age: Tensor,
) -> tuple[Tensor, Tensor]:
    """See :func:`torch_engram.fusion.decoding.fuse_step`."""
    style, convolution = engram.style, engram.convolution
    assert convolution is not None, "a step has what the convolution sees"
    sequences, _, branches, hidden = streams.shape
    out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    gates = torch.empty(sequences, 1, branches, device=streams.device)
    block = triton.next_power_of_2(hidden)
    if sequences:
        _step[(sequences, branches)](
            streams.contiguous(), keys_value.contiguous(), engram.query_weight, engram.key_weight,
            convolution.norm_weight, convolution.weight,
            None if live is None else live.contiguous().view(torch.uint8),
            None if doc_start is None else doc_start.contiguous().view(torch.uint8),
            normed, age, out, gates, normed.stride(0), age.stride(0),
            hidden**0.5, style.weight_offset, style.gate_eps, style.conv_eps, M=branches, D=hidden,
            TAPS=len(convolution.weight), DILATION=convolution.dilation, SIGNED_ZERO=style.copies_sign,
            CASTS=style.casts_after_norms, CROSSES=style.conv_crosses_documents, BLOCK=block,
            num_warps=max(1, min(16, block // _CHANNELS_A_WARP)),
        )  # fmt: skip
    return out, gates


@triton.jit(do_not_specialize=("normed_stride", "age_stride"))
def _step(
    streams, keys_value, query_weight, key_weight, norm_weight, taps, live, doc_start, normed, age, out, gates,
    normed_stride, age_stride, root_of_d, weight_offset, gate_eps, conv_eps,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, SIGNED_ZERO: tl.constexpr,
    CASTS: tl.constexpr, CROSSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, branch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    inside = channel < D
    own = branch * D + channel  # of a weight [M, D]
    h = tl.load(streams + sequence * (M * D) + own, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(keys_value + sequence * ((M + 1) * D) + own, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(keys_value + sequence * ((M + 1) * D) + M * D + channel, mask=inside, other=0.0).to(tl.float32)
    wq = tl.load(query_weight + own, mask=inside, other=0.0).to(tl.float32) + weight_offset
    wk = tl.load(key_weight + own, mask=inside, other=0.0).to(tl.float32) + weight_offset

    rq, rk = tl.rsqrt(tl.sum(h * h) / D + gate_eps), tl.rsqrt(tl.sum(k * k) / D + gate_eps)
    if CASTS:
        agreement = rounded(rounded(h * rq * wq, streams) * rounded(k * rk * wk, streams), streams)
        s = rounded(rounded(tl.sum(tl.where(inside, agreement, 0.0)), streams) / root_of_d, streams)
    else:
        s = tl.sum(h * k * (wq * wk)) * rq * rk / root_of_d
    root = tl.sqrt(tl.maximum(tl.abs(s), SMALLEST_SCORE, propagate_nan=tl.PropagateNan.ALL))
    if not SIGNED_ZERO:
        root = tl.where(s == 0, 0.0, root)
    if CASTS:
        root = rounded(root, streams)
    alpha = tl.sigmoid(tl.where(s < 0, -root, root))
    if CASTS:
        alpha = rounded(alpha, streams)
    if live is not None:
        alpha = tl.where(tl.load(live + sequence) != 0, alpha, 0.0)
    tl.store(gates + sequence * M + branch, alpha)
    u = alpha * v
    if CASTS:
        u = rounded(u, streams)

    last = (TAPS - 1) * DILATION
    mine = tl.load(age + sequence * age_stride + last - 1) + 1
    if doc_start is not None:
        mine = tl.where(tl.load(doc_start + sequence) != 0, 0, mine)
    if branch == 0:
        tl.store(age + sequence * age_stride + last, mine)
    wn = tl.load(norm_weight + own, mask=inside, other=0.0).to(tl.float32) + weight_offset
    x = rounded(u * tl.rsqrt(tl.sum(u * u) / D + conv_eps) * wn, normed)
    held = normed + sequence * normed_stride + own
    tl.store(held + last * (M * D), x.to(normed.dtype.element_ty), mask=inside)
    z = x * tl.load(taps + (TAPS - 1) * (M * D) + own, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        past = tl.load(held + tap * DILATION * (M * D), mask=inside, other=0.0).to(tl.float32)
        if not CROSSES:
            past = tl.where(mine >= (TAPS - 1 - tap) * DILATION, past, 0.0)
        z += past * tl.load(taps + tap * (M * D) + own, mask=inside, other=0.0).to(tl.float32)
    total = h + (u + z * sigmoid(z))
    tl.store(out + sequence * (M * D) + own, total.to(out.dtype.element_ty), mask=inside)
