"""Ways to train a table of rows: this library's, PyTorch's own and engram-peft's, behind one interface.

A way gives the decoder the embeddings of a batch and updates its rows after the backward. All tables have the same rows
in fp32, start at zero, and give the network embeddings of its own type.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from peft_files import load
from torch import Tensor, nn

from torch_engram.addressing import CanonicalVocab, LayerLayout
from torch_engram.config import EngramConfig
from torch_engram.memory import Memory, MemoryBank, WorkingSet
from torch_engram.optim import RowAdam, RowOptimizer, RowwiseAdam
from torch_engram.stores.records import ROW_MASK

LAYER, NAME, RATE = 1, "engram", 1e-3


@dataclass(frozen=True)
class Batch:
    """int64 ``[B, T]`` tokens and targets, and the rows ``[B, T, C]`` that the tokens read."""

    tokens: Tensor
    targets: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Setting:
    """What all ways share at one number of rows."""

    label: str
    """That number, such as ``10M``; the table has a few more, for every head has a prime number of rows."""
    config: EngramConfig
    vocab: CanonicalVocab
    layout: LayerLayout
    batches: Sequence[Batch]
    device: torch.device
    dtype: torch.dtype
    """Of the embeddings."""

    def batch(self, number: int) -> Batch:
        """The batch of step ``number``; after the last comes the first."""
        return self.batches[number % len(self.batches)]

    def memory(self, embeddings: Tensor) -> Memory:
        """``embeddings`` ``[B, T, E]`` as the decoder asks for them."""
        return Memory(lambda layer: {NAME: embeddings} if layer == LAYER else {})


class Way(Protocol):
    """One way to train the table."""

    def begin(self, number: int) -> Memory:
        """The memory of step ``number``; steps come in order."""
        ...

    def update(self) -> None:
        """After the backward: one step of the rows' optimiser."""
        ...

    def settle(self) -> None:
        """Return when the host has nothing left to do for the steps so far."""
        ...

    def gradients(self, rows: Tensor) -> Tensor:
        """Instead of :meth:`update`: the gradients ``[U, dim]`` of the distinct ``rows`` ``[U]``, ascending, that the
        step has read. The step changes no row."""
        ...


class Constant:
    """No table: embeddings that never change. What a step takes with it is the network's."""

    def __init__(self, setting: Setting):
        shape = (*setting.batch(0).tokens.shape, setting.config.embedding_dim)
        self._leaf = torch.zeros(shape, dtype=setting.dtype, device=setting.device, requires_grad=True)
        self._setting = setting

    def begin(self, number: int) -> Memory:
        """See :class:`Way`."""
        self._rows = self._setting.batch(number).rows
        return self._setting.memory(self._leaf)

    def update(self) -> None:
        """See :class:`Way`."""
        self._leaf.grad = None

    def settle(self) -> None:
        """Nothing."""

    def gradients(self, rows: Tensor) -> Tensor:
        """See :class:`Way`."""
        assert self._leaf.grad is not None
        of_reads = self._leaf.grad.float().view(-1, rows_dim(self._setting))
        self._leaf.grad = None
        found = of_reads.new_zeros(len(rows), of_reads.shape[1])
        return found.index_add_(0, torch.searchsorted(rows, self._rows.flatten()), of_reads)


class Ours:
    """A memory bank, its rows prefetched one step ahead."""

    def __init__(self, setting: Setting, optimizer: Callable[..., RowOptimizer], placement: str = "device"):
        self._setting = setting
        self.bank = MemoryBank(
            setting.config, setting.vocab, optimizer=partial(optimizer, lr=RATE), placement=placement,
            device=setting.device, dtype=setting.dtype, name=NAME, layouts={LAYER: setting.layout},
        )  # fmt: skip
        self._step: WorkingSet | None = None
        self._ahead: WorkingSet | None = None

    def begin(self, number: int) -> Memory:
        """See :class:`Way`."""
        fetch = self.bank.prefetch
        self._step = fetch(self._setting.batch(number).tokens) if self._ahead is None else self._ahead
        self._ahead = fetch(self._setting.batch(number + 1).tokens)
        return self._step[0]

    def update(self) -> None:
        """See :class:`Way`."""
        assert self._step is not None
        self._step.reduce()
        self._step.apply()
        self._step = None

    def settle(self) -> None:
        """See :class:`Way`."""
        self.bank.settle()
        self.bank.flush()

    def gradients(self, rows: Tensor) -> Tensor:
        """See :class:`Way`."""
        assert self._step is not None and self._ahead is not None and self.bank.optimizer is not None
        self._step.reduce()
        (proxy,) = self.bank.parameters()
        planes: Any = self.bank.optimizer.state[proxy]
        assert proxy.grad is not None and torch.equal(planes.row_keys & ROW_MASK, rows), "other rows than were read"
        found = proxy.grad.clone()
        self._step.discard()
        self._ahead.discard()
        self._step = self._ahead = None
        return found


class Parameter:
    """The table as a parameter of the network: ``lookup`` makes rows ``[B, T, C]`` embeddings ``[B, T, C, dim]`` in the
    graph, autograd makes the gradient, an optimiser has the whole ``weight``."""

    def __init__(
        self, setting: Setting, lookup: Callable[[Tensor], Tensor], weight: nn.Parameter, optimizer: Any
    ):  # fmt: skip
        self._setting, self._lookup, self._weight, self._optimizer = setting, lookup, weight, optimizer

    def begin(self, number: int) -> Memory:
        """See :class:`Way`."""
        embeddings = self._lookup(self._setting.batch(number).rows).flatten(2)
        return self._setting.memory(embeddings.to(self._setting.dtype))

    def update(self) -> None:
        """See :class:`Way`."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def settle(self) -> None:
        """Nothing."""

    def gradients(self, rows: Tensor) -> Tensor:
        """See :class:`Way`."""
        grad = self._weight.grad
        assert grad is not None
        self._weight.grad = None
        if not grad.is_sparse:
            return grad[rows]
        merged = grad.coalesce()
        assert torch.equal(merged.indices()[0], rows), "other rows than were read"
        return merged.values()


def torch_table(setting: Setting, sparse: bool) -> Parameter:
    """``nn.Embedding`` with Adam's fused kernel, or with ``sparse=True`` and SparseAdam, which has one form only."""
    zeros = torch.zeros(setting.layout.rows, rows_dim(setting), device=setting.device)
    table = nn.Embedding.from_pretrained(zeros, freeze=False, sparse=sparse)
    kind = torch.optim.SparseAdam if sparse else partial(torch.optim.Adam, fused=True)
    return Parameter(setting, table, table.weight, kind([table.weight], lr=RATE))


def peft_table(setting: Setting, folder: Path, sparse: bool) -> Parameter:
    """engram-peft's MultiHeadEmbedding and the optimiser that its get_optimizer() makes for it.

    ``sparse``: as by default, with SparseAdam; else ``use_sparse_embeddings=False`` with its Adam.
    """
    layer, general = load(folder, "layer.py"), load(folder, "utils/general.py")
    with setting.device:
        table = layer.MultiHeadEmbedding(list(setting.layout.flat_primes), rows_dim(setting), sparse=sparse)
    weight = table.embedding.weight
    weight.data.zero_()
    named = nn.ModuleDict({str(LAYER): nn.ModuleDict({"multi_head_embedding": table})})
    model = types.SimpleNamespace(config=types.SimpleNamespace(), base_model=nn.Module(), engram_layers=named)
    kind = "sparse_adam" if sparse else "adam"
    optimizer = general.get_optimizer(model, base_learning_rate=RATE, engram_sparse_optimizer=kind)
    return Parameter(setting, lambda rows: table(rows - table.offsets), weight, optimizer)


def rows_dim(setting: Setting) -> int:
    """Numbers in a row."""
    return setting.config.per_order("row_dim")[0]


@dataclass(frozen=True)
class Kind:
    """How to build a way, and the bytes of a row and its state on the device, by its width."""

    build: Callable[[Setting], Way]
    row_bytes: Callable[[int], int]


def kinds(peft: Path | None) -> dict[str, Kind]:
    """All ways by name; without engram-peft where its folder is not given."""
    found = {
        "ours-adam": Kind(lambda s: Ours(s, RowAdam), lambda dim: 12 * dim + 17),
        "ours-rowwise": Kind(lambda s: Ours(s, RowwiseAdam), lambda dim: 4 * dim + 17),
        "ours-adam-host": Kind(lambda s: Ours(s, RowAdam, "host"), lambda dim: 0),
        "dense-adam": Kind(lambda s: torch_table(s, sparse=False), lambda dim: 16 * dim),
        "sparse-adam": Kind(lambda s: torch_table(s, sparse=True), lambda dim: 12 * dim),
    }
    if peft is not None:
        found["peft-sparse"] = Kind(lambda s: peft_table(s, peft, sparse=True), lambda dim: 12 * dim)
        found["peft-dense"] = Kind(lambda s: peft_table(s, peft, sparse=False), lambda dim: 24 * dim)
    return found
