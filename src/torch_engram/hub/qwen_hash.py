"""Qwen4Exp's own hash, asked for row ids ahead of the lookup: its code, its buffers, its decoding history.

What a position reads depends on the tokens before it, which the model keeps in its cache, and on what it makes of
padding and ends of text. All of that stays the model's: its embedding is run with a table whose row r holds the number
r, on a cache that can be read and not written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_INT64_MAX = 2**63 - 1


def row_ids(embedding: nn.Module, tokens: Tensor, cache: Any) -> Tensor:
    """Row ids int64 ``[B, T, C]`` that a ``Qwen4ExpTextNGramEmbedding`` would look up for ``tokens`` int64 ``[B, T]``
    behind ``cache`` (a transformers ``Cache``, or None), which is left as it is."""
    return _hash(_Standin(embedding), tokens, cache)


def ngram_mixes(embedding: nn.Module, tokens: Tensor, cache: Any) -> Tensor:
    """The mixes int64 ``[B, T, N-1]`` before they are reduced to rows: :func:`row_ids` with heads as large as int64."""
    sizes: Any = embedding.ngram_heads_vocab_sizes
    whole = _Standin(
        embedding,
        ngram_heads_vocab_sizes=torch.full_like(sizes, _INT64_MAX),
        ngram_heads_offsets=torch.zeros_like(sizes),
    )
    heads: Any = embedding.heads_per_ngram
    return _hash(whole, tokens, cache)[..., ::heads]  # all heads of an order have one mix


def _hash(embedding: _Standin, tokens: Tensor, cache: Any) -> Tensor:
    found: Tensor = type(embedding.real).forward(embedding, tokens, None if cache is None else _ReadOnly(cache))
    return found


class _Standin:
    """An embedding as its ``forward`` sees itself, with a table of row numbers and perhaps other buffers."""

    def __init__(self, real: Any, **other: Tensor):
        self.real, self.ngram_embedding = real, _RowNumbers(real.layer_multipliers)
        vars(self).update(other)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class _RowNumbers:
    """A table of one column, whose row r holds r."""

    def __init__(self, weight: Tensor):
        self.weight = weight  # asked for its device

    def __call__(self, ids: Tensor) -> Tensor:
        return ids.unsqueeze(-1)


class _ReadOnly:
    """A cache that tells what it holds and takes nothing."""

    def __init__(self, cache: Any):
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_conv_state(self, *state: Any, **named: Any) -> None:
        pass
