"""Memories on one frozen model, trained by one loop: this library's, and engram-peft's in several settings.

All have the same rows in number and in width, in the same heads, orders and blocks; each has its own start, its own
optimiser and its own way to look rows up. A way lives as long as its turn: it is put on the model,
trained or timed, and taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from attached.backbone import Backbone
from torch_engram.config import EngramConfig
from torch_engram.hub import attach, config_for
from torch_engram.optim import RowAdam, RowOptimizer

ORDERS, HEADS = (2, 3), 8


@dataclass(frozen=True)
class Setting:
    """What all ways share."""

    backbone: Backbone
    rows: int
    """In all blocks together, but for primes."""
    row_dim: int
    layers: tuple[int, ...]
    batches: Tensor
    """int64 ``[steps, B, T]``, of which each predicts its own."""

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.batches.device

    @property
    def rows_per_head(self) -> int:
        """At least; heads have primes."""
        return self.rows // (len(self.layers) * len(ORDERS) * HEADS)

    def config(self) -> EngramConfig:
        """Ours."""
        return config_for(
            self.backbone.model, self.backbone.tokenizer, layers=self.layers, rows_per_head=self.rows_per_head,
            heads=HEADS, row_dim=self.row_dim, pad_id=self.backbone.tokenizer.pad_token_id,
        )  # fmt: skip


class Way(Protocol):
    """A memory that is on the model. ``optimizer`` steps all that is trained."""

    optimizer: torch.optim.Optimizer

    def loss(self, number: int) -> Tensor:
        """Of batch ``number``, as the model tells it."""
        ...

    def train(self, on: bool) -> None:
        """Whether what follows trains."""
        ...

    def remove(self) -> None:
        """Take the memory off, and leave the model as it was."""
        ...


class _OnItself:
    """A way by which the model is called as it always is."""

    def __init__(self, setting: Setting):
        self._model, self._batches = setting.backbone.model, setting.batches

    def loss(self, number: int) -> Tensor:
        """See :class:`Way`."""
        ids = self._batches[number % len(self._batches)]
        found: Tensor = self._model(input_ids=ids, labels=ids).loss
        return found

    def train(self, on: bool) -> None:
        """See :class:`Way`."""
        self._model.train(on)


class Ours(_OnItself):
    """``attach()`` and ``memory.optimizer()``. Rates of its modules and its rows; None is a default."""

    def __init__(
        self, setting: Setting, kind: Callable[..., RowOptimizer] = RowAdam, *, lr: float | None = None,
        row_lr: float | None = None,
    ):  # fmt: skip
        super().__init__(setting)
        rows = kind if row_lr is None else partial(kind, lr=row_lr)
        self.memory = attach(self._model, setting.backbone.tokenizer, setting.config(), optimizer=rows)
        self.optimizer = self.memory.optimizer() if lr is None else self.memory.optimizer(lr=lr)

    def remove(self) -> None:
        """See :class:`Way`."""
        self.memory.bank.settle()
        self.memory.detach()
        self._model.eval()


class Free(_OnItself):
    """What a memory that costs nothing would take: the same backward, through all blocks above the first that has one,
    for a vector that is added there."""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self._vector = torch.zeros(self._model.config.hidden_size, device=setting.device, requires_grad=True)
        block = self._model.model.layers[min(setting.layers)]
        self._hook = block.register_forward_pre_hook(lambda _, args: (args[0] + self._vector, *args[1:]))
        self.optimizer = torch.optim.SGD([self._vector], lr=1e-4)

    def remove(self) -> None:
        """See :class:`Way`."""
        self._hook.remove()
        self._model.eval()


class Peft:
    """``get_engram_model()`` and ``create_optimizer()`` of engram-peft, with batches of its own data collator.

    ``sparse``: its default, with SparseAdam; else ``use_sparse_embeddings=False``, and Adam for all. ``dtype``: its
    ``engram_dtype``. ``hashes``: whether the hook that it puts on the model is left there, which hashes every batch on
    the CPU, also one whose hashes its collator has made. Without it those are used; there is no setting for that.
    """

    def __init__(
        self, package: Any, setting: Setting, *, sparse: bool = True, dtype: str | None = None, hashes: bool = True,
        lr: float | None = None, row_lr: float | None = None,
    ):  # fmt: skip
        base, tokenizer = setting.backbone.model, setting.backbone.tokenizer
        config = package.EngramConfig(
            engram_vocab_size_per_ngram=[HEADS * setting.rows_per_head] * len(ORDERS), ngram_sizes=list(ORDERS),
            n_head_per_ngram=HEADS, embedding_dim=len(ORDERS) * HEADS * setting.row_dim, hc_mult=1,
            target_layers=list(setting.layers), use_sparse_embeddings=sparse, engram_dtype=dtype,
            pad_id=tokenizer.pad_token_id,
        )  # fmt: skip
        package.model.CompressedTokenizer = compressed(package)
        with setting.device:  # a CPU takes minutes to draw so many numbers
            self.model = package.get_engram_model(base, config, tokenizer, train_mode="engram_only")
        rates: dict[str, Any] = {"engram_sparse_optimizer": "sparse_adam" if sparse else "adam"}
        rates |= {} if lr is None else {"engram_dense_learning_rate": lr}
        rates |= {} if row_lr is None else {"engram_sparse_learning_rate": row_lr}
        self.optimizer = self.model.create_optimizer(**rates)
        if not hashes:
            self.model._hook_handles.pop(0).remove()
        self._batches = setting.batches
        collator = package.EngramDataCollator(tokenizer, config, self.model.compressor)
        self.hashed = [self._collated(collator, ids) for ids in setting.batches]

    def _collated(self, collator: Any, ids: Tensor) -> Tensor:
        """Hashes ``[B, T, L, C]`` of a batch, where its worker processes and a pinned copy would have brought them."""
        found: Tensor = collator([{"input_ids": row.tolist()} for row in ids])["engram_hash_indices"]
        return found.to(ids.device)

    def loss(self, number: int) -> Tensor:
        """See :class:`Way`."""
        place = number % len(self._batches)
        ids = self._batches[place]
        found: Tensor = self.model(input_ids=ids, labels=ids, engram_hash_indices=self.hashed[place]).loss
        return found

    def train(self, on: bool) -> None:
        """See :class:`Way`."""
        self.model.train(on)

    def remove(self) -> None:
        """See :class:`Way`."""
        self.model.unload_engram()
        self.model.base_model.eval()


@cache
def compressed(package: Any) -> Callable[..., Any]:
    """Its ``CompressedTokenizer``, made once for a tokenizer: it takes seconds, and counts to no way's time."""
    made: dict[int, Any] = {}
    kind = package.compression.CompressedTokenizer

    def make(name: str | None, tokenizer: Any) -> Any:
        if id(tokenizer) not in made:
            made[id(tokenizer)] = kind(name, tokenizer=tokenizer)
        return made[id(tokenizer)]

    return make
