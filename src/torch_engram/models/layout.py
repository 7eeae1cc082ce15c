"""Where every token stands: its document, its place in it, and so what it may attend to.

Computed once a forward and shared by all blocks. Shapes: B batch, T tokens, S those and the ones before them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from torch_engram.window import Window

EVERYTHING = 1 << 62
"""Positions that a window keeps when it must keep all."""


@dataclass(frozen=True)
class Layout:
    """What attention needs besides queries, keys and values. Without a mask, tokens see all before them."""

    cos: Tensor
    """fp32 ``[B or 1, T, 1, head_dim / 2]``: the rotation of each token."""
    sin: Tensor
    """As ``cos``."""
    mask: Tensor | None = None
    """``[B or 1, 1, T, S]``, 0 where a token may look and -inf elsewhere."""
    block_mask: BlockMask | None = None
    """The same for FlexAttention, in place of ``mask``."""


class SequenceState(Window):
    """All positions of the sequences held: document number, place of what follows in the document, whether live."""

    def __init__(self) -> None:
        super().__init__(EVERYTHING)
        self.plain = True
        """Whether each sequence is one document without dead tokens."""

    def reset(self) -> None:
        """See :class:`torch_engram.window.DecodeState`."""
        super().reset()
        self.plain = True


@dataclass(frozen=True)
class Placement:
    """Positions before they become rotations and masks; S = past + T."""

    place: Tensor
    """int64 ``[B or 1, T]``: live tokens before this one in its document."""
    past: int
    """Positions before the first of the T."""
    document: Tensor | None = None
    """int64 ``[B, S]``, None where there is one document and no dead token."""
    live: Tensor | None = None
    """bool ``[B, S]``, None where all are live."""


def find_places(
    tokens: Tensor, doc_start: Tensor | None, live: Tensor | None, state: SequenceState | None
) -> Placement:
    """Document and place of each token ``[B, T]``; a state is advanced. Dead tokens take no place."""
    shape, device = tokens.shape, tokens.device
    past = len(state) if state is not None else 0
    if (state is None or state.plain) and _is_plain(doc_start, live, past):
        place = torch.arange(past, past + shape[1], device=device)[None]
        if state is not None:
            following = (place + 1).expand(shape)
            state.push(torch.zeros_like(following), following, torch.ones_like(following, dtype=torch.bool))
        return Placement(place, past)

    given, live = live, torch.ones(shape, dtype=torch.bool, device=device) if live is None else live
    doc_start = torch.zeros(shape, dtype=torch.bool, device=device) if doc_start is None else doc_start
    before = live.cumsum(1) - live.long()
    document = doc_start.cumsum(1)
    if state is not None and past:
        held_document, held_following, _ = state.last()
        before = before + held_following[:, -1:]
        document = document + held_document[:, -1:]
    place = before - torch.where(doc_start, before, 0).cummax(1).values
    if state is not None:
        state.push(document, place + live, live)
        state.plain = False
        document, _, given = state.last()
    return Placement(place, past, document, given)


def _is_plain(doc_start: Tensor | None, live: Tensor | None, past: int) -> bool:
    """Whether all is one document a sequence, all live. Tensors are only looked into where that costs no wait."""
    for given in (doc_start, live):
        if given is not None and given.device.type != "cpu":
            return False
    starts = doc_start is not None and bool(doc_start[:, 0 if past else 1 :].any())
    return not starts and (live is None or bool(live.all()))


_NARROWEST_BLOCKED_HEAD = 16  # FlexAttention's kernels take no narrower one


def lay_out(placement: Placement, tokens: int, head_dim: int, theta: float, dtype: torch.dtype) -> Layout:
    """Rotations and masks for ``tokens`` positions; a float mask has ``dtype``."""
    device = placement.place.device
    wavelength = theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = (placement.place[:, :, None] / wavelength)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    if placement.document is None and (placement.past == 0 or tokens == 1):
        return Layout(cos, sin)
    blocks = device.type == "cuda" and head_dim >= _NARROWEST_BLOCKED_HEAD
    if placement.document is not None and placement.past == 0 and blocks:
        return Layout(cos, sin, block_mask=_block_mask(placement))
    return Layout(cos, sin, mask=_dense_mask(placement, tokens, dtype))


def _dense_mask(placement: Placement, tokens: int, dtype: torch.dtype) -> Tensor:
    past, device = placement.past, placement.place.device
    query = torch.arange(past, past + tokens, device=device)[:, None]
    key = torch.arange(past + tokens, device=device)[None]
    sees = (key <= query)[None]
    if placement.document is not None:
        sees = sees & (placement.document[:, past:, None] == placement.document[:, None])
    if placement.live is not None:
        sees = (sees & placement.live[:, None]) | (key == query)  # a dead token, too: there is no softmax over nothing
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, float("-inf"))
    return mask[:, None]


def _block_mask(placement: Placement) -> BlockMask:
    document, live, place = placement.document, placement.live, placement.place.int()
    assert document is not None

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key <= place[batch, query])  # not past the document's first token

    def sees_live(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document[batch, query] == document[batch, key]
        return ((query >= key) & same & live[batch, key]) | (query == key)  # type: ignore[index]

    sequences, tokens = document.shape
    rule = sees if live is None else sees_live  # asking for dead tokens costs a third of the forward (docs/speed.md)
    mask: BlockMask = _compiled_block_mask()(rule, sequences, None, tokens, tokens, device=document.device)
    return mask


@functools.cache
def _compiled_block_mask() -> Callable[..., Any]:
    """Uncompiled, a block mask passes through a dense ``[B, T, T]``."""
    return torch.compile(create_block_mask, dynamic=False)
