"""Causal self-attention with grouped queries, normed queries and keys, and rotary positions.

Shapes: B batch, T tokens, S those and the ones before them, d hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from torch_engram.models.config import DecoderConfig
from torch_engram.models.layout import Layout
from torch_engram.models.rotary import turn

_SMALL_TILES = {
    **{"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3},
    **{"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32},
    **{"bwd_num_warps": 4, "bwd_num_stages": 3},
}
"""For FlexAttention with narrow heads: its own choice takes many times as long forward on an H100 (dev/LOG.md)."""


class KVCache:
    """Keys and values ``[B, kv_heads, S, head_dim]`` of one layer; a :class:`torch_engram.window.DecodeState`.

    Room doubles when it runs out, so that appending a token does not copy the past every time.
    """

    def __init__(self) -> None:
        self.length = 0
        self._room: tuple[Tensor, ...] = ()  # keys and values; valid up to length

    def append(self, *chunk: Tensor) -> tuple[Tensor, ...]:
        """Keys and values held, with these at the end."""
        end = self.length + chunk[0].shape[2]
        if not self._room or end > self._room[0].shape[2]:
            self._room = tuple(self._enlarged(i, new, end) for i, new in enumerate(chunk))
        for room, new in zip(self._room, chunk, strict=True):
            room[:, :, self.length : end] = new
        self.length = end
        return tuple(room[:, :, :end] for room in self._room)

    def _enlarged(self, index: int, like: Tensor, end: int) -> Tensor:
        batch, heads, _, width = like.shape
        room = like.new_empty(batch, heads, max(64, 2 * end), width)
        if self._room:
            room[:, :, : self.length] = self._room[index][:, :, : self.length]
        return room

    def select(self, sequences: Tensor) -> None:
        """See :class:`torch_engram.window.DecodeState`."""
        self._room = tuple(room.index_select(0, sequences.to(room.device)) for room in self._room)

    def repeat(self, times: int) -> None:
        """See :class:`torch_engram.window.DecodeState`."""
        self._room = tuple(room.repeat_interleave(times, dim=0) for room in self._room)

    def crop(self, drop: int) -> None:
        """See :class:`torch_engram.window.DecodeState`; any number of positions."""
        self.length = max(0, self.length - drop)

    def reset(self) -> None:
        """See :class:`torch_engram.window.DecodeState`."""
        self.length, self._room = 0, ()


class Attention(nn.Module):
    """Queries, keys and values are one matrix product; queries and keys are normed per head before they turn."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        assert config.head_dim is not None and config.kv_heads is not None
        self.config = config
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden, config.query_width + 2 * config.kv_width, bias=False)
        self.query_norm = nn.Parameter(torch.empty(self.head_dim))
        self.key_norm = nn.Parameter(torch.empty(self.head_dim))
        self.out = nn.Linear(config.query_width, config.hidden, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Products keep the size of what they map; the output is scaled by the number of residual additions."""
        nn.init.normal_(self.qkv.weight, std=self.config.hidden**-0.5)
        nn.init.normal_(self.out.weight, std=(2 * self.config.layers * self.config.query_width) ** -0.5)
        nn.init.ones_(self.query_norm)
        nn.init.ones_(self.key_norm)

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | None = None) -> Tensor:
        """``[B, T, d]`` from normed hidden states of that shape; a cache is advanced."""
        scales, angles = (self.query_norm, self.key_norm), (layout.cos, layout.sin)
        query, key, value = turn(self.qkv(x), *scales, *angles, self.heads, self.config.norm_eps)
        if cache is not None:
            key, value = cache.append(key, value)
        out: Tensor = self.out(self._attend(query, key, value, layout).transpose(1, 2).flatten(2))
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
        grouped = self.heads != self.kv_heads
        if layout.block_mask is not None:
            # FlexAttention is fast only when compiled; in a block that is being compiled it already is.
            compiling = torch.compiler.is_compiling()
            flex: Any = flex_attention if compiling else _compiled_flex_attention()
            narrow = self.head_dim <= 64 and query.element_size() == 2 and query.shape[2] >= 128
            options = _SMALL_TILES if narrow else None
            attended = flex(query, key, value, block_mask=layout.block_mask, enable_gqa=grouped, kernel_options=options)
            assert isinstance(attended, Tensor)
            return attended
        ordered = layout.mask is None and bool(query.shape[2] > 1)  # a lone token sees all keys there are
        with _fastest() if query.is_cuda and ordered else nullcontext():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=layout.mask, is_causal=ordered, enable_gqa=grouped
            )


def _fastest() -> AbstractContextManager[Any]:
    """In training, cuDNN's attention first: half the time of flash attention on an H100 (docs/speed.md), though never
    deterministic, and planned anew for every shape, of which decoding has many."""
    if not torch.is_grad_enabled() or torch.are_deterministic_algorithms_enabled():
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
