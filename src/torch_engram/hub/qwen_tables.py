"""Which tables fit a Qwen4Exp model: what the model's hash expects of them, and what files and banks hold.

A row means something only beside the hash that chose it. So multipliers, head sizes and offsets are compared, and not
the number of rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torch_engram.addressing import LayerLayout
from torch_engram.config import EngramConfig
from torch_engram.memory import MemoryBank
from torch_engram.stores.named_tables import NamedTable, find_tables
from torch_engram.stores.tensor_files import TensorPlace, read_header, tensors_in

BUFFERS = {
    "multipliers": "layer_multipliers",
    "head sizes": "ngram_heads_vocab_sizes",
    "offsets": "ngram_heads_offsets",
}
"""What the three buffers of a table hold, and what they are called."""
_TABLE = "ngram_embedding"
_EXACT = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class PleHash:
    """What one PLE layer of a model says of its table."""

    layer: int
    rows: int
    width: int
    buffers: Mapping[str, tuple[int, ...]]
    """Multipliers, head sizes and offsets, by those names."""

    @classmethod
    def of(cls, embedding: Any) -> PleHash:
        """Of a ``Qwen4ExpTextNGramEmbedding``. Raises ``ValueError`` when its buffers have no values, or its table is
        in FP8."""
        buffers = {what: getattr(embedding, name) for what, name in BUFFERS.items()}
        if any(buffer.is_meta for buffer in buffers.values()):
            raise ValueError("The model's weights are on the meta device: load them, then serve its PLE tables.")
        table = embedding.ngram_embedding
        if hasattr(table, "weight_scale"):
            raise ValueError(
                "The model's own table is in FP8 with one scale: load it within without_ple_tables(), and serve shards "
                "in BF16, F16 or F32."
            )
        return cls(
            embedding.layer_idx,
            table.num_embeddings,
            table.embedding_dim,
            {what: tuple(buffer.tolist()) for what, buffer in buffers.items()},
        )

    def layout(self, heads: int) -> LayerLayout:
        """The same for a bank, with ``heads`` an order."""
        sizes = self.buffers["head sizes"]
        primes = tuple(sizes[first : first + heads] for first in range(0, len(sizes), heads))
        return LayerLayout(self.layer, self.buffers["multipliers"], primes, self.rows)


def engram_config(config: Any, hashes: Mapping[int, PleHash]) -> EngramConfig:
    """The configuration that a ``Qwen4ExpTextConfig`` has in this library."""
    eos = config.eos_token_id
    return EngramConfig(
        layers=tuple(hashes), hidden=config.hidden_size, vocab_size=config.vocab_size, max_ngram=config.ngram_size,
        heads=config.heads_per_ngram, row_dim=next(iter(hashes.values())).width,
        rows_per_head=config.ngram_vocab_size_base, branches=config.hc_count, scheme="qwen_ple", fusion="qwen-ple",
        pad_id=eos[0] if isinstance(eos, list) else eos, seed=config.seed, conv_kernel=config.ple_conv_kernel_size,
        row_multiple=config.make_ngram_vocab_size_divisible_by,
    )  # fmt: skip


def require_files_fit(path: Path, hashes: Mapping[int, PleHash]) -> None:
    """Raises ``ValueError`` naming what in the safetensors files at ``path`` is not the tables of this model."""
    tensors = tensors_in(path)
    found = {table.layer: table for table in find_tables(tensors) if table.layout == "Qwen4Exp"}
    for layer, hashed in hashes.items():
        if layer not in found:
            has = ", ".join(map(str, sorted(at for at in found if at is not None)))
            raise ValueError(
                f"{path} has no PLE table of layer {layer}, which the model reads"
                f"{f' (it has one of layer {has})' if has else ''}: give the folder of the model's own shards."
            )
        table = found[layer]
        if (table.rows, table.width) != (hashed.rows, hashed.width):
            raise ValueError(
                f"{table.name} in {path} has {table.rows:,} rows of {table.width}, and the model's layer {layer} reads "
                f"{hashed.rows:,} of {hashed.width}: give the folder of the model's own shards."
            )
        _require_same(hashed, _buffers_in(table, tensors), str(path))


def ple_tables(tensors: Mapping[str, TensorPlace]) -> dict[int, tuple[NamedTable, PleHash]]:
    """Every PLE table among ``tensors`` with what its buffers say, by layer. Raises ``ValueError`` naming a buffer that
    is missing or no int64."""
    found = {}
    for table in find_tables(tensors):
        if table.layout != "Qwen4Exp" or table.layer is None:
            continue
        beside = table.name[: table.name.index(_TABLE)]
        for name in BUFFERS.values():
            if beside + name not in tensors:
                raise ValueError(
                    f"There is no tensor {beside + name!r} in these files: give the folder with all shards."
                )
            place = tensors[beside + name]
            if place.dtype != "I64" or len(place.shape) != 1:
                raise ValueError(
                    f"{place.file}: {beside + name!r} is {place.dtype} {list(place.shape)}, not a row of int64: "
                    "give the model's own shards."
                )
        found[table.layer] = table, PleHash(table.layer, table.rows, table.width, _buffers_in(table, tensors))
    return found


def _buffers_in(table: NamedTable, tensors: Mapping[str, TensorPlace]) -> dict[str, tuple[int, ...]]:
    """The buffers that lie beside a table, perhaps in another file; those of a resharded table may be left out."""
    beside = table.name[: table.name.index(_TABLE)]
    places = {what: tensors.get(beside + name) for what, name in BUFFERS.items()}
    return {
        what: tuple(np.fromfile(place.file, np.int64, place.nbytes // 8, offset=place.start).tolist())
        for what, place in places.items()
        if place is not None
    }


def require_bank_fits(bank: MemoryBank, hashes: Mapping[int, PleHash], dtype: torch.dtype) -> None:
    """Raises ``ValueError`` naming what in a bank is not the tables of this model, which computes in ``dtype``."""
    for layer, hashed in hashes.items():
        tables = [table for table in bank.tables if table.layer == layer]
        if not tables:
            raise ValueError(
                f"Memory {bank.name!r} is at layers {list(bank.config.layers)}, and the model reads layer {layer}: "
                "make the bank with the model's layers, counted from 0."
            )
        rows, widths = sum(table.rows for table in tables), {table.dim for table in tables}
        if rows != hashed.rows or widths != {hashed.width}:
            raise ValueError(
                f"Memory {bank.name!r} has {rows:,} rows of {', '.join(map(str, sorted(widths)))} at layer {layer}, "
                f"and the model reads {hashed.rows:,} of {hashed.width}: make the bank of the model's own tables."
            )
        layout = bank.addressing.layouts[layer]
        found = {"multipliers": layout.multipliers, "head sizes": layout.flat_primes, "offsets": layout.offsets}
        _require_same(hashed, found, f"Memory {bank.name!r}")
    if bank.codec not in _EXACT:
        raise ValueError(
            f"Memory {bank.name!r} keeps rows in {bank.codec}, which rounds them, and logits would not be the model's: "
            f"serve rows in {', '.join(_EXACT[:-1])} or {_EXACT[-1]}."
        )
    if bank.dtype not in (torch.float32, dtype):
        raise ValueError(
            f"Memory {bank.name!r} gives embeddings in {bank.dtype}, and the model computes in {dtype}: make the bank "
            f"with dtype={dtype}."
        )


def _require_same(hashed: PleHash, found: Mapping[str, tuple[int, ...]], whose: str) -> None:
    for what, values in found.items():
        if values != hashed.buffers[what]:
            raise ValueError(
                f"{whose} has other {what} at layer {hashed.layer} than the model ({_some(values)} for "
                f"{_some(hashed.buffers[what])}), so that its rows belong to another hash: serve the tables of the "
                "checkpoint that the model was loaded from."
            )


def _some(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values[:3])) + (", …" if len(values) > 3 else "")


def require_no_tables(folder: Path) -> None:
    """Raises ``ValueError`` when safetensors files in ``folder`` hold a PLE table, which a save there would remove."""
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        held = next((name for name in read_header(file) if f".{_TABLE}." in name), None)
        if held is not None:
            raise ValueError(
                f"{file} holds {held!r}, and a served model is saved without its tables: save it into another folder."
            )
