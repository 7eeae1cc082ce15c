"""What a call of a transformers model says of its tokens: ids, padding, where documents begin.

Models are told of padding and packing by ``attention_mask`` and ``position_ids``, in the forms that are read here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_engram.memory import Tokens


def arguments_of(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward was called with, by name."""
    if not args:  # as models call their decoders, and many times over
        return {**named.get("kwargs", {}), **named}
    bound = inspect.signature(module.forward).bind_partial(*args, **named)
    given = dict(bound.arguments)
    return {**given.pop("kwargs", {}), **given}


def tokens_of(given: Mapping[str, Any], past: int | None) -> Tokens:
    """The tokens of one call. ``past``: positions that a cache holds already, None without one.

    Raises ``ValueError`` for a call with embeddings in place of ids.
    """
    ids = given.get("input_ids")
    if ids is None:
        raise ValueError(
            "A memory is looked up by token ids, and this call has inputs_embeds alone: pass input_ids, or leave the "
            "memory out with disabled()."
        )
    live = _live(given.get("attention_mask"), ids.shape, past or 0)
    starts = _starts(given.get("position_ids"), live, ids.shape, past)
    if ids.device.type == "cpu":  # where a mask that marks nothing is soon seen, and left out
        live = None if live is None or live.all() else live
        starts = None if starts is None or not starts.any() else starts
    return Tokens(ids, doc_start=starts, live=live)


def _live(mask: Any, shape: torch.Size, past: int) -> Tensor | None:
    """Bool ``[B, T]`` of what is no padding, from a mask ``[B, past + T]``, one ``[B, 1, T, keys]``, or several of
    those by the kind of attention."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    length = shape[1]
    if mask.dim() == 2:
        return mask[:, -length:] != 0
    seen = mask[:, 0, -1, past : past + length]  # by the last position, which sees all that is no padding
    live = seen if seen.dtype == torch.bool else seen == 0
    return live.expand(shape[0], -1) if live.shape[1] == length else None


def _starts(positions: Any, live: Tensor | None, shape: torch.Size, past: int | None) -> Tensor | None:
    """Bool ``[B, T]``: positions that are numbered 0, or where nothing is numbered, the first behind padding."""
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == shape[1]:
        return (positions == 0).expand(shape[0], -1)
    if live is None or past:
        return None
    return torch.cat((live[:, :1], live[:, 1:] & ~live[:, :-1]), dim=1)
