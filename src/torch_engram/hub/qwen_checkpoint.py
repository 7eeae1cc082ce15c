"""Qwen4Exp's PLE layers under their own names: read in place, and written so that its engines load ours.

Of each layer: the table in consecutive shards, three int64 buffers that say how tokens are hashed, two projections,
three norms and a convolution. With a model of transformers, all of it is written, and ``from_pretrained`` loads it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

from torch_engram.addressing import LayerLayout
from torch_engram.addressing.layout import layouts
from torch_engram.fusion import Engram
from torch_engram.hub.qwen_lookup import AbsentTable
from torch_engram.hub.qwen_ple import find_ple
from torch_engram.hub.qwen_tables import BUFFERS, PleHash, engram_config, ple_tables, require_bank_fits
from torch_engram.hub.qwen_weights import filled, kinds, to_store
from torch_engram.hub.released import (
    CONFIG,
    read_config,
    require_derived,
    require_engrams,
    require_expressible,
    require_layers,
    safe_tensors_in,
    take,
    with_text,
    write_folder,
    write_weights,
)
from torch_engram.memory import MemoryBank, open_bank
from torch_engram.memory.read_through import ReadThrough
from torch_engram.stores.convert import INDEX, Tell
from torch_engram.stores.shards import Target

_NAME = "Qwen4Exp"
_PREFIX, _EMBEDDING = "model.language_model.", "ple_embedding."
_FIXED: dict[str, Any] = dict(scheme="qwen_ple", fusion="qwen-ple", bias=False)
_UNIFORM = ("heads", "row_dim", "rows_per_head")
_EPS = 1e-6


def read_ple(
    folder: str | Path,
    *,
    placement: str = "disk",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[MemoryBank, dict[int, Engram]]:
    """The PLE layers of a Qwen4Exp checkpoint: a bank of their tables, and the filled Engram of each layer.

    ``folder``: of the shards and ``config.json``. ``placement``: where rows live, as
    :class:`~torch_engram.memory.MemoryBank` has it; they are read in place by default. ``device``, ``dtype``: of the
    Engrams and of embeddings. The bank's ``config`` is the memory's, with layers counted from 0. To serve transformers'
    own model from a checkpoint use :func:`~torch_engram.hub.serve_ple`. Raises ``ValueError`` naming the key or tensor
    that is missing, too many, or of another type or shape.
    """
    folder = Path(folder)
    tensors = safe_tensors_in(folder)
    text = _text_in(folder)
    found = ple_tables(tensors)
    require_layers(found, [number - 1 for number in text.ple_layer_ids or ()], folder)
    config = engram_config(text, {layer: hashed for layer, (_, hashed) in found.items()})
    engrams = {}
    for layer, (table, hashed) in found.items():
        _require_derived(hashed, layouts(config)[layer], folder)
        prefix = table.name[: table.name.index(_EMBEDDING)]
        shards = [_EMBEDDING + f"ngram_embedding.shard_{number}.weight" for number in range(len(table.values))]
        others = [_EMBEDDING + name for name in BUFFERS.values()]
        stored = take(tensors, prefix, kinds(config), [*shards, *others])
        engrams[layer] = filled(config, stored).to(device, dtype)
    return MemoryBank(config, tables=folder, placement=placement, device=device, dtype=dtype), engrams


def write_ple(
    memory: MemoryBank | str | Path,
    folder: str | Path,
    engrams: Mapping[int, Engram] | None = None,
    *,
    model: PreTrainedModel | None = None,
    shards: int | None = None,
    tell: Tell | None = None,
) -> None:
    """Write a memory as the PLE layers of Qwen4Exp, into a new ``folder``, which appears when it is whole.

    ``memory``: a bank, as its rows are, or the folder of a saved one; fp32, bf16 and fp16 keep their bytes, other
    codecs become bf16. ``engrams``: of each layer, written in their type; without them only tables, buffers and the
    keys of ``text_config`` are. ``model``: a Qwen4Exp model that reads this memory, by
    :func:`~torch_engram.hub.serve_ple`, or could: all of it is written, with these rows for its own, and
    ``from_pretrained`` loads the folder.
    ``shards``: tensors a table, each in its file; by default the model's ``split_ngram_parts``, or one. ``tell`` hears
    of bytes of tables that were written, a few rows at a time. What stops it leaves nothing under the folder's name;
    with a saved memory the same call then goes on where it was. Raises ``ValueError`` naming what in the memory this
    format does not have, or what does not fit the model, and ``OSError`` when the disk is full.
    """
    folder = Path(folder)
    source = ReadThrough.of(memory if isinstance(memory, MemoryBank) else Path(memory))
    _require_fits(source)
    if engrams is not None and model is not None:
        raise ValueError("A model has its own projections and norms: leave out engrams=, or model=.")
    if model is not None:
        prefix, parts = _fitting(model, memory)
        if shards not in (None, parts):
            raise ValueError(f"The model's split_ngram_parts is {parts}: leave out shards={shards}.")
        company = partial(_save_model, model)
    else:
        if engrams is not None:
            require_engrams(engrams, source.config)
        prefix, parts = _PREFIX, shards or 1
        config = with_text({}, _text_of(source, parts))
        company = partial(write_weights, tensors=_small_tensors(source, engrams or {}), config=config)
    write_folder(source, folder, Target("qwen4exp", shards=parts, prefix=prefix, stem="tables"), company, tell)


def _text_in(folder: Path) -> SimpleNamespace:
    """``text_config`` with transformers' defaults for the keys that it leaves out."""
    _, text = read_config(folder)
    defaults = {field.name: field.default for field in dataclasses.fields(Qwen4ExpTextConfig)}
    found = SimpleNamespace(**{**defaults, **text})
    if found.eos_token_id is None:
        raise ValueError(f"{folder / CONFIG} has no eos_token_id, where segments end: give the model's own.")
    if found.rms_norm_eps != _EPS:
        raise ValueError(
            f"{folder / CONFIG} says rms_norm_eps {found.rms_norm_eps}, and {_NAME}'s gate has {_EPS}: give its own."
        )
    return found


def _require_derived(hashed: PleHash, layout: LayerLayout, folder: Path) -> None:
    for what, values in _hash_of(layout).items():
        if hashed.buffers[what] != values:
            raise ValueError(
                f"{folder} has {what} of layer {hashed.layer} that its {CONFIG} does not give: give the shards and the "
                "configuration of one checkpoint."
            )


def _text_of(memory: ReadThrough, shards: int) -> dict[str, Any]:
    """The keys of ``text_config`` that say what a memory is."""
    config = memory.config
    heads, _, base = (config.per_order(field)[0] for field in _UNIFORM)
    return {
        "ple_layer_ids": [layer + 1 for layer in config.layers],
        "ple_embed_dim": config.embedding_dim,
        "ple_conv_kernel_size": config.conv_kernel,
        "hidden_size": config.hidden,
        "hc_count": config.branches,
        "vocab_size": config.vocab_size,
        "ngram_size": config.max_ngram,
        "heads_per_ngram": heads,
        "ngram_vocab_size_base": base,
        "make_ngram_vocab_size_divisible_by": config.row_multiple,
        "split_ngram_parts": shards,
        "seed": config.seed,
        "eos_token_id": config.pad_id,
        "rms_norm_eps": _EPS,
    }


def _require_fits(memory: ReadThrough) -> None:
    require_expressible(memory, _FIXED, _UNIFORM, _NAME)
    require_derived(memory, _NAME)
    if memory.config.branches < 2:
        raise ValueError(f"Memory {memory.name!r} has branches 1, and {_NAME} two or more: train one with 2.")
    if not memory.config.conv_kernel:
        raise ValueError(f"Memory {memory.name!r} has conv_kernel 0, and {_NAME} a convolution: train one with 4.")


def _small_tensors(memory: ReadThrough, engrams: Mapping[int, Engram]) -> dict[str, Tensor]:
    """Buffers and weights of every layer."""
    found = {}
    for layer, layout in memory.layouts.items():
        prefix = f"{_PREFIX}layers.{layer}.ple."
        for what, values in _hash_of(layout).items():
            found[f"{prefix}{_EMBEDDING}{BUFFERS[what]}"] = torch.tensor(values, dtype=torch.int64)
        if layer in engrams:
            found.update({prefix + name: tensor for name, tensor in to_store(engrams[layer]).items()})
    return found


# -- a whole model ------------------------------------------------------------------------------------------------


def _fitting(model: PreTrainedModel, memory: MemoryBank | str | Path) -> tuple[str, int]:
    """What stands before ``layers.`` in the names of a model's weights, and its tables' shards.

    Raises ``ValueError`` naming what in the memory is not the model's.
    """
    text_model, embeddings = find_ple(model)
    bank = memory if isinstance(memory, MemoryBank) else open_bank(Path(memory), placement="disk")
    hashes = {layer: PleHash.of(embedding) for layer, embedding in embeddings.items()}
    require_bank_fits(bank, hashes, next(iter(embeddings.values())).ngram_embedding.weight.dtype)
    buffer = next(name for name in model.state_dict() if name.endswith(BUFFERS["multipliers"]))
    return buffer[: buffer.index("layers.")], text_model.config.split_ngram_parts


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    """All of a model but its tables, in files that have no table's name; no index, and no single file is taken for the
    whole."""
    inner = folder / "model"
    with _without_tables(model):
        model.save_pretrained(inner)
    for file in inner.iterdir():
        single = "model-00001-of-00001.safetensors" if file.name == "model.safetensors" else file.name
        if file.name != INDEX:
            file.rename(folder / single)
    shutil.rmtree(inner)


@contextmanager
def _without_tables(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model has no table of its own."""
    _, embeddings = find_ple(model)
    own = {layer: embedding.ngram_embedding for layer, embedding in embeddings.items()}
    for layer, embedding in embeddings.items():
        if not isinstance(own[layer], AbsentTable):
            embedding.ngram_embedding = AbsentTable(own[layer].num_embeddings, own[layer].embedding_dim)
    try:
        yield
    finally:
        for layer, embedding in embeddings.items():
            embedding.ngram_embedding = own[layer]


def _hash_of(layout: LayerLayout) -> dict[str, tuple[int, ...]]:
    """What :data:`BUFFERS` hold."""
    return {"multipliers": layout.multipliers, "head sizes": layout.flat_primes, "offsets": layout.offsets}
