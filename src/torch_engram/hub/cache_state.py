"""What a memory remembers of the sequences in a transformers cache: it follows whatever the cache does to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from torch_engram.fusion.engram import EngramState
from torch_engram.window import States, Window

DRAFTS = 64
"""Positions that can be taken back, as assisted decoding does with rejected drafts."""


class MemoryState(States):
    """Of one memory: the last tokens, and every layer's convolution."""

    def __init__(self, history: Window, layers: Mapping[int, EngramState]):
        self.history, self.layers = history, dict(layers)
        self.seen = 0
        """Positions so far."""

    def _parts(self) -> list[Window]:
        return sorted((self.history, *self.layers.values()), key=lambda window: window.keep)

    def crop(self, drop: int) -> None:
        """See :class:`~torch_engram.window.DecodeState`."""
        super().crop(drop)
        self.seen -= drop

    def reset(self) -> None:
        """See :class:`~torch_engram.window.DecodeState`."""
        super().reset()
        self.seen = 0


class _Followed:
    """In front of a cache's own class: memories' states, by the name of the memory, move with its sequences."""

    engram_states: dict[str, MemoryState]

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        for state in self.engram_states.values():
            state.select(beam_idx)
        return super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> Any:
        for state in self.engram_states.values():
            state.select(indices)
        return super().batch_select_indices(indices)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> Any:
        for state in self.engram_states.values():
            state.repeat(repeats)
        return super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def crop(self, *given: Any, **named: Any) -> Any:
        before = int(self.get_seq_length())  # type: ignore[attr-defined]
        result = super().crop(*given, **named)  # type: ignore[misc]
        drop = before - int(self.get_seq_length())  # type: ignore[attr-defined]
        for state in self.engram_states.values():
            state.crop(drop)
        return result

    def reset(self) -> Any:
        for state in self.engram_states.values():
            state.reset()
        return super().reset()  # type: ignore[misc]


def cache_among(given: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments or results, by its name or the one that it had in transformers 5.17."""
    return given.get("cache", given.get("past_key_values"))


def states_of(cache: Cache) -> dict[str, MemoryState]:
    """The states that follow ``cache``, by the name of the memory; from now on it is followed."""
    followed: Any = cache
    if not isinstance(cache, _Followed):
        own = type(cache)
        followed.engram_states = {}
        followed.__class__ = _classes.setdefault(own, type(own.__name__, (_Followed, own), {}))
    states: dict[str, MemoryState] = followed.engram_states
    return states


_classes: dict[type, type] = {}
"""By a cache's own class the one that follows it."""
