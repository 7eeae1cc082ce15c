"""Qwen4Exp with its PLE tables in our store: the model is transformers' own, and its rows are fetched by a bank.

Only the lookup is replaced. The model hashes its tokens itself (:mod:`torch_engram.hub.qwen_hash`), so that caches,
beams, padding and ends of text are treated as it treats them. Where its first layer begins, its tokens are known: rows
are asked for there, once each, and arrive while the layers before the PLE layer run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen

from torch_engram.hub.cache_state import cache_among
from torch_engram.hub.qwen_hash import ngram_mixes, row_ids
from torch_engram.hub.qwen_lookup import AbsentTable, ServedTable
from torch_engram.hub.qwen_tables import (
    PleHash,
    engram_config,
    require_bank_fits,
    require_files_fit,
    require_no_tables,
)
from torch_engram.memory import Memory, MemoryBank


@contextmanager
def without_ple_tables() -> Iterator[None]:
    """Qwen4Exp models that are built or loaded in this block are without their PLE tables; all else is as ever.

    Such a model takes the memory of its other weights, and runs once :func:`serve_ple` was called. The block changes
    transformers' classes, for all threads.
    """
    embedding: Any = qwen.Qwen4ExpTextNGramEmbedding
    construct = embedding.__init__
    ignored = qwen.Qwen4ExpTextModel._keys_to_ignore_on_load_unexpected

    def construct_without(self: Any, *args: Any, **named: Any) -> None:
        with torch.device("meta"):
            construct(self, *args, **named)
        self.layer_multipliers = nn.Buffer(
            qwen._build_layer_multipliers(self.unigram_vocab_size, self.ngram_size, self.ple_layer_index, self.seed)
        )
        self.ngram_heads_vocab_sizes = nn.Buffer(torch.tensor(self.head_vocab_sizes))
        self.ngram_heads_offsets = nn.Buffer(torch.tensor(self.head_offsets))
        table = self.ngram_embedding
        self.ngram_embedding = AbsentTable(table.num_embeddings, table.embedding_dim)

    embedding.__init__ = construct_without
    qwen.Qwen4ExpTextModel._keys_to_ignore_on_load_unexpected = [*ignored, r"\.ple_embedding\.ngram_embedding\."]
    try:
        yield
    finally:
        embedding.__init__ = construct
        qwen.Qwen4ExpTextModel._keys_to_ignore_on_load_unexpected = ignored


def serve_ple(model: PreTrainedModel, tables: str | Path | MemoryBank, *, placement: str | None = None) -> ServedPle:
    """Let a Qwen4Exp model read its PLE tables from ``tables``; :meth:`ServedPle.detach` undoes it.

    ``model``: any of transformers' Qwen4Exp classes, with tables of its own (which are kept, and not read) or loaded
    within :func:`without_ple_tables`. ``tables``: the folder of the checkpoint's safetensors shards, or a bank that
    holds them. ``placement``: where a folder's rows live, as :class:`~torch_engram.memory.MemoryBank` has it; they stay
    on disk by default.

    Outputs are those of the model with its own tables, bit for bit. Rows are only read: they get no gradient. A served
    model is saved without them, and not over them. Raises ``ValueError`` naming what in the tables does not fit the
    model: layer, rows, width, multipliers, head sizes, offsets, codec or type.
    """
    text_model, embeddings = ple_of(model)
    hashes = {layer: PleHash.of(embedding) for layer, embedding in embeddings.items()}
    first = next(iter(embeddings.values()))
    device, dtype = first.layer_multipliers.device, first.ngram_embedding.weight.dtype
    if isinstance(tables, MemoryBank):
        if placement is not None:
            raise ValueError(f"A bank's rows are placed already: leave out placement={placement!r}, or give a folder.")
        bank = tables
    else:
        bank = _open(Path(tables), hashes, text_model.config, placement or "disk", device, dtype)
    require_bank_fits(bank, hashes, dtype)
    return ServedPle(model, text_model, embeddings, bank)


def _open(
    folder: Path,
    hashes: dict[int, PleHash],
    config: Any,
    placement: str,
    device: torch.device,
    dtype: torch.dtype,
) -> MemoryBank:
    """A bank that reads the tables in ``folder``, with the model's own multipliers and head sizes."""
    require_files_fit(folder, hashes)
    layouts = {layer: hashed.layout(config.heads_per_ngram) for layer, hashed in hashes.items()}
    return MemoryBank(
        engram_config(config, hashes), tables=folder, placement=placement, device=device, dtype=dtype, layouts=layouts
    )


def ple_of(model: nn.Module) -> tuple[Any, dict[int, Any]]:
    """As :func:`find_ple`, of a model that is not served."""
    text_model, embeddings = find_ple(model)
    if any(isinstance(embedding.ngram_embedding, ServedTable) for embedding in embeddings.values()):
        raise ValueError("This model's PLE tables are served already: detach() what serve_ple gave, then serve others.")
    return text_model, embeddings


def find_ple(model: nn.Module) -> tuple[Any, dict[int, Any]]:
    """The text model within ``model``, and its n-gram embeddings by layer, counted from 0. Raises ``ValueError`` for a
    model without."""
    text_model: Any = next((part for part in model.modules() if isinstance(part, qwen.Qwen4ExpTextModel)), None)
    if text_model is None:
        raise ValueError(f"{type(model).__name__} is no Qwen4Exp model: give one of transformers' Qwen4Exp classes.")
    layers = enumerate(text_model.layers)
    embeddings = {index: layer.ple.ple_embedding for index, layer in layers if layer.ple is not None}
    if not embeddings:
        raise ValueError(f"{type(model).__name__} has no PLE layer (ple_layer_ids is empty): use it as it is.")
    return text_model, embeddings


class ServedPle:
    """What :func:`serve_ple` has put into a model: a served table in each PLE layer, and hooks that ask for rows."""

    def __init__(self, model: PreTrainedModel, text_model: Any, embeddings: dict[int, Any], bank: MemoryBank):
        self.bank, self._embeddings = bank, embeddings
        self._own = {layer: embedding.ngram_embedding for layer, embedding in embeddings.items()}
        self._calls = threading.local()
        """Of each thread's forward: ``ahead``, what was asked for, by layer; ``due``, what a lookup is to take."""
        for layer, embedding in embeddings.items():
            device = embedding.layer_multipliers.device
            embedding.ngram_embedding = ServedTable(self._own[layer], partial(self._take, layer), device)
        self._hooks = [
            text_model.register_forward_pre_hook(self._enter),
            text_model.layers[0].register_forward_pre_hook(self._ask_ahead, with_kwargs=True),
            text_model.register_forward_hook(self._leave, always_call=True),
            *(
                embedding.register_forward_pre_hook(partial(self._before_lookup, layer), with_kwargs=True)
                for layer, embedding in embeddings.items()
            ),
        ]
        self._savers = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        for part in self._savers:
            vars(part)["save_pretrained"] = partial(_save_elsewhere, part)  # of a copied model, the copy's

    def detach(self) -> None:
        """Give the model back as it was: its own tables, or none, where it was loaded without."""
        for hook in self._hooks:
            hook.remove()
        for part in self._savers:
            vars(part).pop("save_pretrained", None)
        for layer, embedding in self._embeddings.items():
            embedding.ngram_embedding = self._own[layer]
        self._hooks, self._savers, self._embeddings = [], [], {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ServedPle:
        """A copy of a served model is served by the same bank."""
        return self

    # -- in a forward ---------------------------------------------------------------------------------------------

    def _enter(self, text_model: Any, args: Any) -> None:
        self._calls.ahead = {}

    def _leave(self, text_model: Any, args: Any, output: Any) -> None:
        self._calls.ahead = None

    def _ask_ahead(self, first_layer: Any, args: Any, named: dict[str, Any]) -> None:
        """The first layer is given the tokens that the PLE layers will be given: ask for their rows."""
        ahead, tokens = getattr(self._calls, "ahead", None), named.get("ple_input_ids")
        if ahead is None or tokens is None:  # recomputed in a backward, or called by itself
            return
        for layer, embedding in self._embeddings.items():
            if tokens.device == embedding.layer_multipliers.device:
                cache = cache_among(named)
                ahead[layer] = tokens, cache, self._ask(layer, embedding, tokens, cache)

    def _before_lookup(self, layer: int, embedding: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Let the lookup that follows take the rows that were asked for, if they are of these very tokens and cache."""
        given = dict(zip(("input_ids", "cache"), args, strict=False)) | named
        tokens, cache = given["input_ids"], cache_among(given)
        asked = (getattr(self._calls, "ahead", None) or {}).pop(layer, None)
        if asked is not None and asked[0] is tokens and asked[1] is cache:
            self._calls.due = asked[2]
        else:
            self._calls.due = self._ask(layer, embedding, tokens, cache)

    @torch.no_grad()
    def _ask(self, layer: int, embedding: Any, tokens: Tensor, cache: Any) -> Memory:
        tokens = tokens.long()
        mixes = ngram_mixes(embedding, tokens, cache) if self.bank.grouped else None
        return self.bank.read_rows(layer, row_ids(embedding, tokens, cache), mixes)

    def _take(self, layer: int) -> Tensor:
        memory, self._calls.due = self._calls.due, None
        embeddings: Tensor = memory.wait(layer)[self.bank.name]
        return embeddings


def _save_elsewhere(model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **named: Any) -> Any:
    """``save_pretrained`` that refuses a folder with PLE tables: it would write over them, or remove them."""
    require_no_tables(Path(save_directory))
    return type(model).save_pretrained(model, save_directory, *args, **named)
