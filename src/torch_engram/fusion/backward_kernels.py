"""The fusion's backward pass on a GPU: what is cheap is computed again, and no sum depends on the order of threads.

With g the gradient of the output, per token and branch, and the names of :mod:`torch_engram.fusion.forward_kernels`:

    dz   = g * SiLU'(z)                             z_t = sum over taps j of W_j * cw * r_{t-j} * v_{t-j}
    da   = sum(g * v) + dr * eps / q**(3/2)         q = alpha**2 * mean(v**2) + eps
    dr   = sum(v * dx)                              dx_t = sum over taps j of W_j * cw * dz_{t+j}
    ds   = da * alpha * (1 - alpha) / (2 * sqrt|s|)
    dh   = g + A * k * w - B * h                    A = ds * rq * rk / sqrt(D),  B = ds * s * rq**2 / D
    dk   =     A * h * w - C * k                                                 C = ds * s * rk**2 / D
    dv   = sum over branches of (alpha * g + r * dx - dr * alpha**3 / q**(3/2) / D * v)

(t-j stands for j dilations back.) The kernels, in this order: what v gets from the sum and through the convolution,
in one walk along the tokens in which dz is never stored; the factors of a token and branch; dh and dk; what v gets
through its norm. Sums over channels are left as one part a chunk of channels, sums over tokens as one part a block of
tokens; both are added up afterwards, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torch_engram.fusion.forward_kernels import (
    SMALLEST_SCORE,
    convolve,
    meet,
    nothing,
    numbers,
    sigmoid,
    tap_weights,
    values,
    walkers,
)


@triton.jit
def _value_gradients(
    grad, keys_value, alpha, value_scale, kernel, age, grad_keys_value, row_sums, tap_sums, tokens, dilation,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, REACH: tl.constexpr,
    BRANCHES: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum over branches of (alpha * g + r * dx) of the tokens that some rows walk through and a chunk of channels; the
    parts of sum(g * v) and of dr, ``[chunks, 2, M, n]``; and sum over these tokens of dz * r * v
    ``[blocks, TAPS, M, D]``, from which the gradients of both parameters of the convolution follow."""
    block, chunk, branch, token, channel, exists = walkers(dilation, M, D, BRANCHES, STEPS, ROWS, CHUNK)
    column, value_column = branch[:, :, None] * D + channel, (M + 0 * branch)[:, :, None] * D + channel
    weights = tap_weights(kernel, column, exists, M, D, TAPS)
    seen = nothing(TAPS, BRANCHES, ROWS, CHUNK)
    sent = nothing(TAPS, BRANCHES, ROWS, CHUNK)
    totals = nothing(TAPS, BRANCHES, ROWS, CHUNK)
    gate_sums = row_sums + (chunk.to(tl.int64) * 2 * M + branch) * tokens
    scale_sums = row_sums + (chunk.to(tl.int64) * 2 * M + M + branch) * tokens
    for step in tl.range(-REACH, STEPS + REACH, num_stages=STAGES):
        now = token + step * dilation
        if TAPS > 0:
            there = (now >= 0) & (now < tokens)
            place = now.to(tl.int64) * M + branch
            v = numbers(keys_value, now, value_column, there[:, :, None] & exists, (M + 1) * D)
            g = numbers(grad, now, column, (there & (step >= 0))[:, :, None] & exists, M * D)
            x = tl.load(value_scale + place, mask=there & (branch < M), other=0.0)[:, :, None] * v
            old = tl.load(age + now, mask=there, other=0)
            seen = meet(seen, x, old >= dilation, REACH)
            z = convolve(seen, weights, TAPS)
            slope = sigmoid(z)
            dz = g * slope * (1 + z * (1 - slope))
            sent = send_back(sent, dz, weights, old, dilation, TAPS)
            if step < STEPS:  # the last steps only bring what a row's last tokens get from later ones
                totals = add_products(totals, dz, seen, TAPS)
        done = now - REACH * dilation  # to which no later token sends anything
        there = (done >= 0) & (done < tokens) & (step >= REACH)
        here = there & (branch < M)
        place = done.to(tl.int64) * M + branch
        v = numbers(keys_value, done, value_column, there[:, :, None] & exists, (M + 1) * D)
        g = numbers(grad, done, column, there[:, :, None] & exists, M * D)
        dv = tl.load(alpha + place, mask=here, other=0.0)[:, :, None] * g
        tl.store(gate_sums + done, tl.sum(g * v, axis=2), mask=here)
        if TAPS > 0:
            dv += tl.load(value_scale + place, mask=here, other=0.0)[:, :, None] * sent[0]
            tl.store(scale_sums + done, tl.sum(sent[0] * v, axis=2), mask=here)
        dv = tl.broadcast_to(tl.sum(dv, axis=0, keep_dims=True), exists.shape[0], ROWS, CHUNK)
        at = done.to(tl.int64)[:, :, None] * ((M + 1) * D) + value_column
        alone = (there & (branch == 0))[:, :, None] & exists
        tl.store(grad_keys_value + at, dv.to(grad_keys_value.dtype.element_ty), mask=alone)
    for tap in tl.static_range(TAPS):
        at = (block.to(tl.int64) * TAPS + tap) * M * D + column
        tl.store(tap_sums + at, tl.sum(totals[tap], axis=1, keep_dims=True), mask=exists)


@triton.jit
def send_back(sent, dz, weights, old, dilation, TAPS: tl.constexpr):
    """What the convolution has sent back to the tokens that rows have passed, their present ones last: ``sent`` a step
    ago, and now dz times the tap's weight to those of the same document."""
    more = ()
    for tap in tl.static_range(TAPS - 1):
        back = (TAPS - 1 - tap) * dilation
        more = more + (sent[tap + 1] + tl.where((old >= back)[:, :, None], dz, 0.0) * weights[tap],)
    return more + (dz * weights[TAPS - 1],)


@triton.jit
def add_products(totals, dz, seen, TAPS: tl.constexpr):
    """The sums over tokens of dz * r * v, a tap each, with those of a tile."""
    more = ()
    for tap in tl.static_range(TAPS):
        more = more + (totals[tap] + dz * seen[tap],)
    return more


@triton.jit
def _gate_slopes(
    row_sums, grad_alpha, alpha, query_rms, key_rms, score, value_rms, of_product, of_query, of_key, of_value,
    tokens, chunks, conv_eps, scale, M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A, B, C and the factor of v of one branch of some tokens, each fp32 ``[n, M]``; ``scale`` is 1 / sqrt(D)."""
    tokens = tl.cast(tokens, tl.int64)
    branch = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    place = token * M + branch
    da = tl.load(grad_alpha + place, mask=here, other=0.0)
    dr = tl.zeros([TOKENS], tl.float32)
    sums = row_sums + branch * tokens + token
    for _ in range(chunks):
        da += tl.load(sums, mask=here, other=0.0)
        if TAPS > 0:
            dr += tl.load(sums + M * tokens, mask=here, other=0.0)
        sums += 2 * M * tokens
    a = tl.load(alpha + place, mask=here, other=0.0)
    rv = tl.load(value_rms + place, mask=here, other=0.0)  # q**(-1/2)
    through_norm = dr * rv * rv * rv
    da += through_norm * conv_eps
    s = tl.load(score + place, mask=here, other=1.0)
    size = tl.abs(s)
    ds = tl.where(size >= SMALLEST_SCORE, da * a * (1 - a) / (2 * tl.sqrt(size)), 0.0)
    rq = tl.load(query_rms + place, mask=here, other=0.0)
    rk = tl.load(key_rms + place, mask=here, other=0.0)
    tl.store(of_product + place, ds * rq * rk * scale, mask=here)
    tl.store(of_query + place, ds * s * rq * rq / D, mask=here)
    tl.store(of_key + place, ds * s * rk * rk / D, mask=here)
    tl.store(of_value + place, -through_norm * a * a * a / D, mask=here)


@triton.jit
def place_of(M: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """The branch, the channels and the block of tokens of a program; those of one block run side by side."""
    program = tl.program_id(0)
    chunks = tl.cdiv(D, CHUNK)
    channel = program // M % chunks * CHUNK + tl.arange(0, CHUNK)
    return program % M, channel, (program // (M * chunks)).to(tl.int64)


@triton.jit
def _key_gradients(
    grad, streams, keys_value, weight, of_product, of_query, of_key, grad_streams, grad_keys_value, weight_sums, tokens,
    M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The slopes dh and dk of a block of tokens and a chunk of channels of one branch, and sum over tokens of A * h * k
    ``[blocks, M, D]``."""
    branch, channel, block = place_of(M, D, CHUNK)
    w = tl.load(weight + branch * D + channel, mask=channel < D, other=0.0)[None]
    total = tl.zeros([TOKENS, CHUNK], tl.float32)
    for first in range(0, BLOCK, TOKENS):
        token = block * BLOCK + first + tl.arange(0, TOKENS)
        here = token < tokens
        inside = here[:, None] & (channel < D)[None]
        place = token * M + branch
        at = place[:, None] * D + channel[None]
        key_at = (token * (M + 1) + branch)[:, None] * D + channel[None]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(streams + at, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(keys_value + key_at, mask=inside, other=0.0).to(tl.float32)
        product = tl.load(of_product + place, mask=here, other=0.0)[:, None]
        dh = g + product * k * w - tl.load(of_query + place, mask=here, other=0.0)[:, None] * h
        dk = product * h * w - tl.load(of_key + place, mask=here, other=0.0)[:, None] * k
        tl.store(grad_streams + at, dh.to(grad_streams.dtype.element_ty), mask=inside)
        tl.store(grad_keys_value + key_at, dk.to(grad_keys_value.dtype.element_ty), mask=inside)
        total += product * h * k
    tl.store(weight_sums + (block * M + branch) * D + channel, tl.sum(total, axis=0), mask=channel < D)


@triton.jit
def _add_through_norm(
    keys_value, of_value, grad_keys_value, tokens,
    M: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds to dv what comes through the norm of u."""
    chunks = tl.cdiv(D, CHUNK)
    channel = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    token = (tl.program_id(0) // chunks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    factor = tl.zeros([TOKENS], tl.float32)
    for branch in range(M):
        factor += tl.load(of_value + token * M + branch, mask=here, other=0.0)
    v = values(keys_value + M * D, token, here, channel, M, D)
    dv = values(grad_keys_value + M * D, token, here, channel, M, D) + factor[:, None] * v
    at = (token * (M + 1) + M)[:, None] * D + channel[None]
    tl.store(grad_keys_value + at, dv.to(grad_keys_value.dtype.element_ty), mask=here[:, None] & (channel < D)[None])
