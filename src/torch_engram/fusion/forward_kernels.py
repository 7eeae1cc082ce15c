"""The fusion's forward pass on a GPU, after the one matrix product: gates from row sums, then everything that is added.

Tensors are read as rows of a token, n = B * T tokens in all: streams ``[n, M, D]``, keys and value ``[n, (M + 1) * D]``
(M keys, then the value). Statistics of a token and branch are fp32 ``[n, M]``. There are fewer than 2**31 tokens, but a
tensor may have more elements: places in it are int64. The gated value u = alpha * v is nowhere stored: its norm is one
number a token and branch, so what the convolution reads is RMSNorm(u) = r * v * weight with
r = alpha / sqrt(alpha**2 * mean(v**2) + eps). Kernels that convolve walk along the tokens and keep what the taps see in
registers (``walkers``); a document starts where a token's ``age`` is less than what a tap looks back.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST_SCORE = tl.constexpr(1e-6)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _measure(
    streams, keys_value, query_weight, key_weight, live, alpha, value_scale, query_rms, key_rms, score, value_rms,
    tokens, gate_eps, conv_eps, root_of_d,
    M: tl.constexpr, D: tl.constexpr, CASTS: tl.constexpr, SIGNED_ZERO: tl.constexpr, LIVE: tl.constexpr,
    TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Norms, scores and gates of some tokens, and r as ``value_scale``. With ``CASTS`` the normed queries and keys and
    all that follows, up to the gate, are rounded to the streams' type."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    vv = tl.zeros([TOKENS, CHUNK], tl.float32)
    for first in range(0, D, CHUNK):
        v = values(keys_value + M * D, token, here, first + tl.arange(0, CHUNK), M, D)
        vv += v * v
    mean = tl.sum(vv, axis=1) / D
    for branch in range(M):
        place = token * M + branch
        hh = tl.zeros([TOKENS, CHUNK], tl.float32)
        kk = tl.zeros([TOKENS, CHUNK], tl.float32)
        hk = tl.zeros([TOKENS, CHUNK], tl.float32)
        for first in range(0, D, CHUNK):
            h, k, wq, wk = agreeing(
                streams, keys_value, query_weight, key_weight, token, here, branch, first, M, D, CHUNK
            )
            hh += h * h
            kk += k * k
            if not CASTS:
                hk += h * k * (wq * wk)
        rq = tl.rsqrt(tl.sum(hh, axis=1) / D + gate_eps)
        rk = tl.rsqrt(tl.sum(kk, axis=1) / D + gate_eps)
        if CASTS:
            for first in range(0, D, CHUNK):
                h, k, wq, wk = agreeing(
                    streams, keys_value, query_weight, key_weight, token, here, branch, first, M, D, CHUNK
                )
                hk += rounded(rounded(h * rq[:, None] * wq, streams) * rounded(k * rk[:, None] * wk, streams), streams)
            s = rounded(rounded(tl.sum(hk, axis=1), streams) / root_of_d, streams)
        else:
            s = tl.sum(hk, axis=1) * rq * rk / root_of_d
        root = tl.sqrt(tl.maximum(tl.abs(s), SMALLEST_SCORE, propagate_nan=tl.PropagateNan.ALL))
        if not SIGNED_ZERO:
            root = tl.where(s == 0, 0.0, root)
        if CASTS:
            root = rounded(root, streams)
        gate = tl.sigmoid(tl.where(s < 0, -root, root))
        if CASTS:
            gate = rounded(gate, streams)
        if LIVE:
            gate = tl.where(tl.load(live + token, mask=here, other=0) != 0, gate, 0.0)
        rv = tl.rsqrt(gate * gate * mean + conv_eps)
        tl.store(alpha + place, gate, mask=here)
        tl.store(value_scale + place, gate * rv, mask=here)
        tl.store(query_rms + place, rq, mask=here)
        tl.store(key_rms + place, rk, mask=here)
        tl.store(score + place, s, mask=here)
        tl.store(value_rms + place, rv, mask=here)


@triton.jit
def agreeing(
    streams, keys_value, query_weight, key_weight, token, here, branch, first,
    M: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Streams and keys ``[TOKENS, CHUNK]`` of a branch, and their weights ``[1, CHUNK]``."""
    channel = first + tl.arange(0, CHUNK)
    inside = here[:, None] & (channel < D)[None]
    h = tl.load(streams + (token * M + branch)[:, None] * D + channel[None], mask=inside, other=0.0).to(tl.float32)
    k = values(keys_value + branch * D, token, here, channel, M, D)
    wq = tl.load(query_weight + branch * D + channel, mask=channel < D, other=0.0)
    wk = tl.load(key_weight + branch * D + channel, mask=channel < D, other=0.0)
    return h, k, wq[None], wk[None]


@triton.jit
def rounded(x, like):
    """fp32 with no more digits than the type of ``like`` has."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def values(value, token, here, channel, M: tl.constexpr, D: tl.constexpr):
    """Values (or keys) ``[tokens, channels]`` in fp32, zero where not ``here``."""
    inside = here[:, None] & (channel < D)[None]
    return tl.load(value + (token * (M + 1))[:, None] * D + channel[None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sigmoid(x):
    """1 / (1 + e**-x), as the square of a reciprocal root: half the instructions of a division."""
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def walkers(
    dilation, M: tl.constexpr, D: tl.constexpr,
    BRANCHES: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A tile ``[BRANCHES, ROWS, CHUNK]`` that walks: its block, chunk, branches ``[BRANCHES, 1]``, first tokens
    ``[1, ROWS]``, channels ``[1, 1, CHUNK]`` and which of branches and channels exist ``[BRANCHES, 1, CHUNK]``.

    A row goes through ``STEPS`` tokens, a dilation apart, and so has met what its taps see a few steps before; as many
    rows as a dilation together go through a stretch of tokens without gaps. Chunks of one block run side by side."""
    chunks = tl.cdiv(D, CHUNK)
    block, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    row = block * ROWS + tl.arange(0, ROWS)
    token = row // dilation * (STEPS * dilation) + row % dilation
    branch = tl.arange(0, BRANCHES)[:, None]
    channel = (chunk * CHUNK + tl.arange(0, CHUNK))[None, None]
    return block, chunk, branch, token[None], channel, (branch < M)[:, :, None] & (channel < D)


@triton.jit
def numbers(tensor, token, column, here, WIDTH: tl.constexpr):
    """In fp32 the columns ``[BRANCHES, 1, CHUNK]`` of tokens ``[1, ROWS]`` of a tensor ``[tokens, WIDTH]``; zero where
    not ``here``."""
    at = token.to(tl.int64)[:, :, None] * WIDTH + column
    return tl.load(tensor + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def tap_weights(kernel, column, exists, M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr):
    """What each tap multiplies by, from ``kernel`` ``[TAPS, M * D]``, taps times the weight of the norm: a tuple of
    ``[BRANCHES, 1, CHUNK]``, oldest tap first."""
    weights = ()
    for tap in tl.static_range(TAPS):
        weights = weights + (tl.load(kernel + tap * M * D + column, mask=exists, other=0.0),)
    return weights


@triton.jit
def nothing(TILES: tl.constexpr, BRANCHES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """A tuple of tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles = tiles + (tl.zeros([BRANCHES, ROWS, CHUNK], tl.float32),)
    return tiles


@triton.jit
def meet(past, x, joined, REACH: tl.constexpr):
    """What the taps see from the tokens where rows have come to, oldest first, ``x`` last; ``past`` is what they saw a
    step ago. It is forgotten where a row is not ``joined`` to it: where that was another document."""
    seen = ()
    for tap in tl.static_range(REACH):
        seen = seen + (tl.where(joined[:, :, None], past[tap + 1], 0.0),)
    return seen + (x,)


@triton.jit
def convolve(seen, weights, TAPS: tl.constexpr):
    """The sums z of a tile."""
    z = seen[0] * weights[0]
    for tap in tl.static_range(1, TAPS):
        z += seen[tap] * weights[tap]
    return z


@triton.jit
def _add(
    streams, keys_value, alpha, value_scale, kernel, age, out, tokens, dilation,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, REACH: tl.constexpr,
    BRANCHES: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Streams h + alpha * v + SiLU(z) of the tokens that some rows walk through, and a chunk of channels."""
    _, _, branch, token, channel, exists = walkers(dilation, M, D, BRANCHES, STEPS, ROWS, CHUNK)
    column, value_column = branch[:, :, None] * D + channel, (M + 0 * branch)[:, :, None] * D + channel
    weights = tap_weights(kernel, column, exists, M, D, TAPS)
    seen = nothing(TAPS, BRANCHES, ROWS, CHUNK)
    for step in tl.range(-REACH, STEPS, num_stages=STAGES):  # the first steps only meet what a row's first tokens see
        now = token + step * dilation
        there = (now >= 0) & (now < tokens)
        here, own = there & (branch < M), there & (branch < M) & (step >= 0)
        place = now.to(tl.int64) * M + branch
        v = numbers(keys_value, now, value_column, there[:, :, None] & exists, (M + 1) * D)
        total = numbers(streams, now, column, own[:, :, None] & exists, M * D)
        total += tl.load(alpha + place, mask=own, other=0.0)[:, :, None] * v
        if TAPS > 0:
            x = tl.load(value_scale + place, mask=here, other=0.0)[:, :, None] * v
            seen = meet(seen, x, tl.load(age + now, mask=there, other=0) >= dilation, REACH)
            z = convolve(seen, weights, TAPS)
            total += z * sigmoid(z)
        at = now.to(tl.int64)[:, :, None] * (M * D) + column
        tl.store(out + at, total.to(out.dtype.element_ty), mask=own[:, :, None] & exists)
