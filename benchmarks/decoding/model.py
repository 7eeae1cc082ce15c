"""A decoder in the shape of Qwen3's, of random weights, that computes one token of each of B sequences.

It is as small as it can be and still be fast, for what a memory costs is measured against it: one product for queries,
keys and values, one for gate and up, residuals added by the products that make them, attention in one kernel. The
hidden state ``[B, d]`` is changed in place, at one address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.attention import EPS, RaggedCache, attend, swiglu


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; the vocabulary is DeepSeek-V4's."""

    hidden: int
    inner: int
    layers: int = 36
    heads: int = 32
    groups: int = 8
    width: int = 128
    vocab: int = 129_280


SHAPES = {
    "4b": Shape(hidden=2560, inner=9728),
    "8b": Shape(hidden=4096, inner=12_288),
    "tiny": Shape(hidden=64, inner=96, layers=4, heads=4, groups=2, width=16),
}


class Layer(NamedTuple):
    """Weights of a block; matrices as ``torch.nn.Linear`` has them."""

    attention_norm: Tensor
    qkv: Tensor
    query_norm: Tensor
    key_norm: Tensor
    out: Tensor
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor


class DecodeModel:
    """``positions``: of the longest sequence. Nothing has a gradient."""

    def __init__(self, shape: Shape, positions: int, device: torch.device, dtype: torch.dtype):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.embedding = self._matrix(shape.vocab, shape.hidden, 1.0)
        self.head = self._matrix(shape.vocab, shape.hidden, shape.hidden**-0.5)
        self.norm = torch.ones(shape.hidden, device=device, dtype=dtype)
        self.layers = [self._layer() for _ in range(shape.layers)]
        frequencies = 1e6 ** -(torch.arange(0, shape.width, 2, device=device) / shape.width)
        angles = torch.arange(positions, device=device)[:, None] * frequencies
        self.cos, self.sin = angles.cos(), angles.sin()

    def _matrix(self, rows: int, columns: int, std: float) -> Tensor:
        return torch.empty(rows, columns, device=self.device, dtype=self.dtype).normal_(std=std)

    def _layer(self) -> Layer:
        shape, total = self.shape, self.shape.heads * self.shape.width
        norms = (torch.ones(size, device=self.device, dtype=self.dtype) for size in (shape.hidden, shape.width))
        of_hidden, of_head = norms
        return Layer(
            of_hidden,
            self._matrix(total + 2 * shape.groups * shape.width, shape.hidden, shape.hidden**-0.5),
            of_head,
            of_head,
            self._matrix(shape.hidden, total, (2 * shape.layers * total) ** -0.5),
            of_hidden,
            self._matrix(2 * shape.inner, shape.hidden, shape.hidden**-0.5),
            self._matrix(shape.hidden, shape.inner, (2 * shape.layers * shape.inner) ** -0.5),
        )

    @property
    def bytes_read(self) -> int:
        """Of weights by one step: all but the embedding."""
        weights = [self.head, *(weight for layer in self.layers for weight in layer)]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def embed(self, ids: Tensor, out: Tensor) -> None:
        """The hidden state of ids ``[B]``, in ``out`` ``[B, d]``."""
        torch.index_select(self.embedding, 0, ids, out=out)

    def run(self, x: Tensor, cache: RaggedCache, layers: range) -> None:
        """Pass ``x`` ``[B, d]`` through some layers, and add to their keys and values."""
        for number in layers:
            layer = self.layers[number]
            qkv = F.linear(self._normed(x, layer.attention_norm), layer.qkv)
            mixed = attend(qkv, layer.query_norm, layer.key_norm, self.cos, self.sin, cache, number)
            x.addmm_(mixed, layer.out.t())
            x.addmm_(swiglu(F.linear(self._normed(x, layer.ffn_norm), layer.gate_up)), layer.down.t())

    def predict(self, x: Tensor, out: Tensor) -> None:
        """Logits ``[B, V]`` in ``out``."""
        torch.mm(self._normed(x, self.norm), self.head.t(), out=out)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPS)
