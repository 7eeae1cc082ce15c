"""Which tokens of a held-out text end an n-gram that a run has trained on: what it can repeat, and what is new."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from torch_engram.data import PackedBatches, TokenFile

ORDER = 13
"""Tokens of an n-gram that is taken as a passage repeated, as in the usual checks for contamination."""
_WINDOWS_AT_ONCE = 4096
_MULTIPLIER = -0x61C8864680B583EB  # odd; powers of it differ in all bits


def seen_before(
    held_out: TokenFile, trained: PackedBatches, batches: int, *, order: int = ORDER, device: str = "cpu"
) -> Tensor:
    """Bool ``[len(held_out)]`` on the device: whether a token and the ``order - 1`` before it stand together in one of
    the windows of the first ``batches`` batches, its last target included.

    N-grams are compared by hashes of 64 bits. Takes some 32 bytes a trained token on the device.
    """
    known = torch.cat([_hashes(chunk.to(device), order).flatten() for chunk in _windows(trained, batches)])
    known, _ = known.sort()
    asked = _hashes(torch.from_numpy(held_out.tokens.astype(np.int64)).to(device), order)
    at = torch.searchsorted(known, asked).clamp_(max=max(0, len(known) - 1))
    found = known[at] == asked if len(known) else torch.zeros_like(asked, dtype=torch.bool)
    return torch.cat((found.new_zeros(min(order - 1, len(held_out))), found))


def _windows(trained: PackedBatches, batches: int) -> Iterator[Tensor]:
    """Windows with their last targets, int64 ``[n, T + 1]``, some at a time."""
    numbers = np.unique(trained.windows_of(0, batches))
    inside = np.arange(trained.seq_len + 1)
    for first in range(0, len(numbers), _WINDOWS_AT_ONCE):
        begins = numbers[first : first + _WINDOWS_AT_ONCE, None] * trained.seq_len
        yield torch.from_numpy(trained.token_file.tokens[begins + inside].astype(np.int64))


def _hashes(tokens: Tensor, order: int) -> Tensor:
    """Of every ``order`` tokens in a row: int64 ``[..., T - order + 1]``, modulo 2**64."""
    count = max(0, tokens.shape[-1] - order + 1)
    hashes = tokens.new_zeros(*tokens.shape[:-1], count)
    for age in range(order):
        hashes = hashes * _MULTIPLIER + tokens[..., age : age + count] + 1
    return hashes
