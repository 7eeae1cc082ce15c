"""Random numbers that belong to a place: the same bits for the same row, wherever it lies and whoever asks.

Everything is integer arithmetic up to one exact scaling, so a CPU, a GPU and any sharding agree to the last bit. The
Triton twins are in :mod:`torch_engram.stores.counter_kernels`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch holds."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


GAMMA = _signed(0x9E3779B97F4A7C15)
MIX1 = _signed(0xBF58476D1CE4E5B9)
MIX2 = _signed(0x94D049BB133111EB)


def scramble(x: Tensor) -> Tensor:
    """splitmix64's output function on int64 tensors (products wrap; shifts are made logical by a mask)."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MIX2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def seed_term(seed: int) -> int:
    """What a seed adds to the product of a key and :data:`GAMMA`, as an int64."""
    return _signed(seed * 0xD1342543DE82EF95 + 1)


def counter_bits(seed: int, keys: Tensor, draws: Tensor | int, width: int, plane: int = 0) -> Tensor:
    """64 random bits for every (seed, key, draw, plane, column): int64 ``[U, width]``.

    ``keys``: int64 ``[U]``, space and row in one. ``draws``: int64 ``[U]`` or one number: how often a row has drawn.
    """
    base = scramble(keys * GAMMA + seed_term(seed))
    base = scramble(base + (_signed(draws * MIX2) if isinstance(draws, int) else draws * MIX2))
    first = (plane << 32) + 1
    column = torch.arange(first, first + width, device=keys.device, dtype=torch.int64) * GAMMA
    return scramble(base[:, None] + column)


def initial_rows(seed: int, keys: Tensor, width: int, std: float) -> Tensor:
    """A row before its first update: fp32 ``[U, width]`` with mean 0 and deviation ``std``.

    The sum of four 16-bit uniforms: near enough to a normal distribution, and exact until its one multiplication.
    """
    bits = counter_bits(seed, keys, -1, width)
    total = sum(((bits >> shift) & 0xFFFF for shift in (0, 16, 32, 48)), torch.zeros_like(bits))
    return (2 * total - 4 * 0xFFFF).to(torch.float32) * initial_scale(std)


def initial_scale(std: float) -> float:
    """What twice the centred sum of four 16-bit uniforms is multiplied by to have deviation ``std``."""
    return std / (2 * math.sqrt(4 * (2.0**32 - 1) / 12))
