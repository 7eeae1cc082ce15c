"""The fusion's forward pass on a GPU, after the one matrix product: gates from row sums, then everything that is added.

Tensors are read as rows of a token, n = B * T tokens in all: streams ``[n, M, D]``, keys and value ``[n, (M + 1) * D]``
(M keys, then the value). Statistics of a token and branch are fp32 ``[n, M]``. Token numbers are int64: a tensor may
have more than 2**31 elements. The gated value u = alpha * v is nowhere stored: its norm is one number a token and
branch, so what the convolution reads is RMSNorm(u) = r * v * weight with r = alpha / sqrt(alpha**2 * mean(v**2) + eps).
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST_SCORE = tl.constexpr(1e-6)


@triton.jit
def _measure(
    streams, keys_value, weight, live, alpha, value_scale, query_rms, key_rms, score, value_rms,
    tokens, gate_eps, conv_eps, scale,
    M: tl.constexpr, D: tl.constexpr, SIGNED_ZERO: tl.constexpr, LIVE: tl.constexpr,
    TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Norms, scores and gates of some tokens, and r as ``value_scale``; ``scale`` is 1 / sqrt(D)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    vv = tl.zeros([TOKENS], tl.float32)
    for first in range(0, D, CHUNK):
        v = values(keys_value + M * D, token, here, first + tl.arange(0, CHUNK), M, D)
        vv += tl.sum(v * v, axis=1)
    for branch in range(M):
        hh = tl.zeros([TOKENS], tl.float32)
        kk = tl.zeros([TOKENS], tl.float32)
        hk = tl.zeros([TOKENS], tl.float32)
        place = token * M + branch
        for first in range(0, D, CHUNK):
            channel = first + tl.arange(0, CHUNK)
            inside = here[:, None] & (channel < D)[None]
            h = tl.load(streams + place[:, None] * D + channel[None], mask=inside, other=0.0).to(tl.float32)
            k = values(keys_value + branch * D, token, here, channel, M, D)
            w = tl.load(weight + branch * D + channel, mask=channel < D, other=0.0)
            hh += tl.sum(h * h, axis=1)
            kk += tl.sum(k * k, axis=1)
            hk += tl.sum(h * k * w[None], axis=1)
        rq = tl.rsqrt(hh / D + gate_eps)
        rk = tl.rsqrt(kk / D + gate_eps)
        s = hk * rq * rk * scale
        root = tl.sqrt(tl.maximum(tl.abs(s), SMALLEST_SCORE, propagate_nan=tl.PropagateNan.ALL))
        if not SIGNED_ZERO:
            root = tl.where(s == 0, 0.0, root)
        gate = tl.sigmoid(tl.where(s < 0, -root, root))
        if LIVE:
            gate = tl.where(tl.load(live + token, mask=here, other=0) != 0, gate, 0.0)
        rv = tl.rsqrt(gate * gate * vv / D + conv_eps)
        tl.store(alpha + place, gate, mask=here)
        tl.store(value_scale + place, gate * rv, mask=here)
        tl.store(query_rms + place, rq, mask=here)
        tl.store(key_rms + place, rk, mask=here)
        tl.store(score + place, s, mask=here)
        tl.store(value_rms + place, rv, mask=here)


@triton.jit
def values(value, token, here, channel, M: tl.constexpr, D: tl.constexpr):
    """Values (or keys) ``[tokens, channels]`` in fp32, zero where not ``here``."""
    inside = here[:, None] & (channel < D)[None]
    return tl.load(value + (token * (M + 1))[:, None] * D + channel[None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def seen_values(
    value, value_scale, age, token, here, branch, channel, dilation,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """For each tap, oldest first, r * v as some tokens see it through that tap: a tuple of ``[tokens, channels]``."""
    old = tl.load(age + token, mask=here, other=0)
    seen = ()
    for tap in tl.static_range(TAPS):
        back = (TAPS - 1 - tap) * dilation
        reached = here & (old >= back)
        r = tl.load(value_scale + (token - back) * M + branch, mask=reached, other=0.0)
        seen = seen + (values(value, token - back, reached, channel, M, D) * r[:, None],)
    return seen


@triton.jit
def tap_weights(kernel, branch, channel, M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr):
    """What each tap multiplies some channels of a branch by, from ``kernel`` ``[TAPS, M, D]``, taps times the weight of
    the norm: a tuple of ``[1, channels]``."""
    weights = ()
    for tap in tl.static_range(TAPS):
        w = tl.load(kernel + (tap * M + branch) * D + channel, mask=channel < D, other=0.0)
        weights = weights + (w[None],)
    return weights


@triton.jit
def convolve(seen, weights, TAPS: tl.constexpr):
    """The sums z of some tokens and channels of one branch."""
    z = tl.zeros_like(seen[0])
    for tap in tl.static_range(TAPS):
        z += seen[tap] * weights[tap]
    return z


@triton.jit
def place_of(M: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """The branch, the channels and the block of tokens of a program; those of one block run side by side."""
    program = tl.program_id(0)
    chunks = tl.cdiv(D, CHUNK)
    channel = program // M % chunks * CHUNK + tl.arange(0, CHUNK)
    return program % M, channel, (program // (M * chunks)).to(tl.int64)


@triton.jit
def _add(
    streams, keys_value, alpha, value_scale, kernel, age, out, tokens, dilation,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Streams h + alpha * v + SiLU(z) of a block of tokens and a chunk of channels of one branch."""
    branch, channel, block = place_of(M, D, CHUNK)
    value = keys_value + M * D
    weights = tap_weights(kernel, branch, channel, M, D, TAPS)
    for first in range(0, BLOCK, TOKENS):
        token = block * BLOCK + first + tl.arange(0, TOKENS)
        here = token < tokens
        inside = here[:, None] & (channel < D)[None]
        at = (token * M + branch)[:, None] * D + channel[None]
        h = tl.load(streams + at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(alpha + token * M + branch, mask=here, other=0.0)
        total = h + a[:, None] * values(value, token, here, channel, M, D)
        if TAPS > 0:
            seen = seen_values(value, value_scale, age, token, here, branch, channel, dilation, M, D, TAPS)
            z = convolve(seen, weights, TAPS)
            total += z * tl.sigmoid(z)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
