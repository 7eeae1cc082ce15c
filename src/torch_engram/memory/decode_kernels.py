"""The last tokens of decoded sequences moved on by one: the Triton twin of ``push`` in :mod:`decoding`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SEQUENCES = 32
"""Sequences of one program, each a thread's: a thread reads a token before it writes over it."""


def push_triton(ids: Tensor, tokens: Tensor, start: Tensor, dead: Tensor) -> None:
    """See :func:`torch_engram.memory.decoding.push`."""
    (sequences, length), flags = tokens.shape, (start.view(torch.uint8), dead.view(torch.uint8))
    grid = (triton.cdiv(sequences, _SEQUENCES),)
    _push[grid](ids, tokens, *flags, sequences, LENGTH=length, SEQUENCES=_SEQUENCES, num_warps=1)


@triton.jit
def _push(ids, tokens, start, dead, sequences, LENGTH: tl.constexpr, SEQUENCES: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)
    here = sequence < sequences
    first = sequence * LENGTH
    for at in tl.static_range(LENGTH - 1):
        tl.store(tokens + first + at, tl.load(tokens + first + at + 1, mask=here), mask=here)
        tl.store(start + first + at, tl.load(start + first + at + 1, mask=here), mask=here)
        tl.store(dead + first + at, tl.load(dead + first + at + 1, mask=here), mask=here)
    tl.store(tokens + first + LENGTH - 1, tl.load(ids + sequence, mask=here), mask=here)
    nothing = tl.zeros([SEQUENCES], tl.uint8)
    tl.store(start + first + LENGTH - 1, nothing, mask=here)
    tl.store(dead + first + LENGTH - 1, nothing, mask=here)
