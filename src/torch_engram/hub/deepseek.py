"""DeepSeek-V4.1's Engrams under their own names: read in place, and written so that its engines load ours.

Of each layer there are ``embed`` (the table, FP8 with a scale for 32 numbers), ``wkv`` (FP8 with a scale for 32x32),
``q_weight`` and ``k_weight`` (bf16). Multipliers and primes are not stored: whoever loads derives them from
``text_config``, as we do, and the canonical vocabulary from the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from torch_engram.addressing import CanonicalVocab
from torch_engram.addressing.layout import layouts
from torch_engram.config import EngramConfig
from torch_engram.data import load_tokenizer, tokenizer_digest
from torch_engram.fusion import Engram
from torch_engram.hub.deepseek_weights import SIDE, filled, kinds, to_store
from torch_engram.hub.released import (
    key,
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
from torch_engram.memory import MemoryBank
from torch_engram.memory.read_through import ReadThrough
from torch_engram.stores.convert import Tell
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.shards import Target
from torch_engram.stores.tensor_files import TensorPlace

_NAME = "DeepSeek-V4.1"
_KEYS = {
    "layers": "engram_layer_ids", "hidden": "hidden_size", "vocab_size": "engram_compressed_vocab_size",
    "max_ngram": "engram_max_ngram_size", "heads": "engram_n_heads", "row_dim": "engram_head_dim",
    "rows_per_head": "engram_vocab_size", "branches": "hc_mult", "pad_id": "engram_pad_token_id",
}  # fmt: skip
_ROWS, _EPS = "engram_num_embeddings", "rms_norm_eps"
_FIXED: dict[str, Any] = dict(
    scheme="engram", fusion="deepseek-v4.1", seed=0, conv_kernel=0, bias=False, row_multiple=1
)
_UNIFORM = ("heads", "row_dim", "rows_per_head")
_GATE_EPS = 1e-20
_EMBED = ("embed.weight", "embed.scale")
_TOKENIZER = "tokenizer.json"


def read_deepseek(
    folder: str | Path,
    vocab: CanonicalVocab | None = None,
    *,
    placement: str = "disk",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[MemoryBank, dict[int, Engram]]:
    """The memory of a DeepSeek-V4.1 checkpoint: a bank of its tables, and the filled Engram of each layer.

    ``folder``: of the shards and ``config.json``. ``vocab``: by default that of the ``tokenizer.json`` in it.
    ``placement``: where rows live, as :class:`~torch_engram.memory.MemoryBank` has it; they are read in place by
    default. ``device``, ``dtype``: of the Engrams, whose FP8 weights fp32 and bf16 hold exactly, and of embeddings. The
    bank's ``config`` is the memory's. Raises ``ValueError`` naming the key or tensor that is missing, too many, or of
    another type or shape.
    """
    folder = Path(folder)
    tensors = safe_tensors_in(folder)
    config = _config_in(folder)
    if vocab is None:
        if not (folder / _TOKENIZER).is_file():
            raise ValueError(f"{folder} has no {_TOKENIZER}, which says what tokens are alike: give vocab=.")
        vocab = CanonicalVocab.of(folder / _TOKENIZER)
    engrams = {
        layer: filled(config, stored).to(device, dtype)
        for layer, stored in _weights_in(folder, tensors, config).items()
    }
    bank = MemoryBank(config, vocab, tables=folder, placement=placement, device=device, dtype=dtype)
    return bank, engrams


def write_deepseek(
    memory: MemoryBank | str | Path,
    folder: str | Path,
    engrams: Mapping[int, Engram] | None = None,
    *,
    like: str | Path | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    tell: Tell | None = None,
) -> None:
    """Write a memory as DeepSeek-V4.1 has it, into a new ``folder``, which appears when it is whole.

    ``memory``: a bank, as its rows are, or the folder of a saved one. ``engrams``: of each layer; without them only
    tables and configuration are written. ``like``: a checkpoint of this format, such as the one that was read: Engrams
    whose weights are the same keep its bytes, and its configuration's other keys and its tokenizer come along.
    ``tokenizer``: to be written beside. ``tell`` hears of bytes of tables that were written. Rows in FP8 keep their
    bytes, others are rounded to nearest, a few at a time. What stops it leaves nothing under the folder's name; with a
    saved memory the same call then goes on where it was. Raises ``ValueError`` naming what in the memory this format
    does not have, and ``OSError`` when the disk is full.
    """
    folder, like = Path(folder), None if like is None else Path(like)
    source = ReadThrough.of(memory if isinstance(memory, MemoryBank) else Path(memory))
    _require_fits(source)
    if engrams is not None:
        require_engrams(engrams, source.config)
    before = {} if like is None else read_config(like)[0]
    config = with_text(before, _text_of(source))
    vocabulary = _tokenizer_file(source, like, tokenizer)
    near = {}
    if like is not None and engrams is not None and config == before:
        near = _weights_in(like, safe_tensors_in(like), source.config)

    def company(beside: Path) -> None:
        weights = {}
        for layer, engram in (engrams or {}).items():
            made = to_store(engram, near.get(layer))
            weights.update({f"layers.{layer}.engram.{name}": tensor for name, tensor in made.items()})
        write_weights(beside, weights, config)
        if vocabulary is not None:
            (beside / _TOKENIZER).write_bytes(vocabulary)

    target = Target("deepseek-v4.1", shards=len(source.tables), prefix="", stem="tables")
    write_folder(source, folder, target, company, tell)


def _weights_in(folder: Path, tensors: Mapping[str, TensorPlace], config: EngramConfig) -> dict[int, dict[str, Tensor]]:
    """The small tensors of each layer, among those of ``folder``."""
    tables = {table.layer: table.name for table in find_tables(tensors) if table.layout == _NAME}
    require_layers((layer for layer in tables if layer is not None), config.layers, folder)
    return {
        layer: take(tensors, tables[layer].removesuffix(_EMBED[0]), kinds(config), _EMBED) for layer in config.layers
    }


# -- configuration ------------------------------------------------------------------------------------------------


def _config_in(folder: Path) -> EngramConfig:
    _, text = read_config(folder)
    config = EngramConfig.from_dict({**_FIXED, **{field: key(text, name, folder) for field, name in _KEYS.items()}})
    rows = [layout.rows for layout in layouts(config).values()]
    if key(text, _ROWS, folder) != rows:
        raise ValueError(
            f"{folder / 'config.json'} says {_ROWS} {text[_ROWS]}, and its other keys give {rows}: use an intact copy."
        )
    if text.get(_EPS, _GATE_EPS) != _GATE_EPS:
        raise ValueError(
            f"{folder / 'config.json'} says {_EPS} {text[_EPS]}, and {_NAME}'s gate has {_GATE_EPS}: give its own."
        )
    return config


def _text_of(memory: ReadThrough) -> dict[str, Any]:
    """The keys of ``text_config`` that say what a memory is."""
    config = memory.config
    fields = {**config.to_dict(), **{field: config.per_order(field)[0] for field in _UNIFORM}}
    rows = [layout.rows for layout in memory.layouts.values()]
    return {**{name: fields[field] for field, name in _KEYS.items()}, _ROWS: rows, _EPS: _GATE_EPS}


def _require_fits(memory: ReadThrough) -> None:
    config = memory.config
    require_expressible(memory, _FIXED, _UNIFORM, _NAME)
    for field in ("row_dim", "hidden"):
        size = config.per_order(field)[0] if field == "row_dim" else config.hidden
        if size % SIDE:
            raise ValueError(
                f"Memory {memory.name!r} has {field} {size}, and {_NAME} has a scale for {SIDE} numbers: train one "
                f"with a multiple of {SIDE}."
            )
    require_derived(memory, _NAME)


def _tokenizer_file(memory: ReadThrough, like: Path | None, tokenizer: Tokenizer | str | Path | None) -> bytes | None:
    """The bytes of what is to lie beside. Raises ``ValueError`` for one that the memory was not made for."""
    beside = None if like is None else like / _TOKENIZER
    if tokenizer is None and (beside is None or not beside.is_file()):
        return None
    backend = load_tokenizer(beside if tokenizer is None else tokenizer)
    if memory.vocab is not None and memory.vocab.tokenizer_digest != tokenizer_digest(backend):
        raise ValueError(f"Memory {memory.name!r} was made for another tokenizer: give that one.")
    return backend.to_str(pretty=True).encode() if tokenizer is not None or beside is None else beside.read_bytes()
