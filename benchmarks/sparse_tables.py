"""Tables larger than the disk, for measurements: opened as any table in files is, their random rows drawn in memory.

The file has its header and its full length and nothing else: holes, which read as zeros and are not even read. It is
deleted as soon as the bank is open. The random bytes are drawn in place, in the memory that the bank serves its rows
from, since a file that had them would not fit the disk. So every row goes the way that a loaded one goes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from torch_engram.addressing import CanonicalVocab
from torch_engram.bench.lookup_tables import row_bytes, scaled, tables_at
from torch_engram.config import EngramConfig
from torch_engram.memory import MemoryBank
from torch_engram.stores import LoadedStore, NgramCache, RecordLayout, SharedHostStore, make_keys
from torch_engram.stores.layouts import LAYOUTS, components_of
from torch_engram.stores.pages import map_shared
from torch_engram.stores.shared_memory import Segment
from torch_engram.stores.synthetic import random_component
from torch_engram.stores.tensor_files import encode_header, file_size

PRESET, CODEC = "deepseek-v4.1", "fp8"
_DRAWN = 1 << 28
"""Bytes that are drawn; the rest of a table repeats them."""
_CHUNK_ROWS = 1 << 16
"""Rows that random_component() draws at once."""
_SHIFT = 7919
"""A prime, so that every repetition begins at another row of what was drawn."""


def host_bank(
    layers: Sequence[int],
    gigabytes: float,
    vocab: CanonicalVocab,
    cache: str | None,
    device: torch.device,
    placement: str = "host",
) -> MemoryBank:
    """``deepseek-v4.1`` at ``layers``, scaled to tables of at least ``gigabytes`` in all (1e9 bytes, as files have
    them), in memory and full of random rows.

    No file holds them: they are drawn in place, since such a file would not fit the disk. ``placement``: ``host``, or
    ``device`` for a table that fits there. Embeddings are bf16 on a GPU and fp32 elsewhere. Raises ``ValueError`` for
    another placement, or where memory does not suffice.
    """
    if placement not in ("host", "device"):
        raise ValueError(f"Rows are drawn in memory: placement is 'host' or 'device', not {placement!r}.")
    config = EngramConfig.preset(PRESET, layers=tuple(sorted(set(layers))), vocab_size=vocab.size)
    width = config.per_order("row_dim")[0]
    rows = -(-int(gigabytes * 1e9) // (len(config.layers) * row_bytes(CODEC, width)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tables.safetensors"
        sparse_file(path, config.layers, rows, width)
        config, layouts = scaled(config, tables_at(path))
        bank = MemoryBank(
            config, vocab, tables=path, placement=placement, cache=cache, device=device, layouts=layouts,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )  # fmt: skip
    fill(writable_records(bank), store_of(bank).layout, device)
    return bank


def sparse_file(path: Path, layers: Sequence[int], rows: int, width: int) -> None:
    """A table of each layer as DeepSeek-V4.1 has them, without their bytes. Raises ``OSError`` when it cannot be
    written."""
    names = [LAYOUTS[PRESET].names.format(layer=layer) for layer in layers]
    parts = {name: part for one in names for name, part in components_of(one, CODEC, width).items()}
    tensors = {name: (part.dtype, (rows, part.width)) for name, part in parts.items()}
    with open(path, "wb") as file:
        file.write(encode_header(tensors))
        file.truncate(file_size(tensors))


def store_of(bank: MemoryBank) -> SharedHostStore | LoadedStore:
    """The store that holds a bank's tables, behind its cache."""
    store = bank.source(bank.tables[0]).store
    store = store.store if isinstance(store, NgramCache) else store
    assert isinstance(store, SharedHostStore | LoadedStore)
    return store


def host_words(bank: MemoryBank) -> Tensor | None:
    """The table int64 ``[rows, nbytes / 8]`` in host memory as kernels of the bank's GPU reach it; None without a GPU,
    and where it does not."""
    store = store_of(bank)
    if bank.device.type != "cuda" or not isinstance(store, SharedHostStore):
        return None
    return store._reads_of(torch.device(bank.device.type, torch.cuda.current_device())).words


def writable_records(bank: MemoryBank) -> Tensor:
    """The table uint8 ``[rows, nbytes]`` in a map that may be written to."""
    table = store_of(bank).table
    if isinstance(table.memory, Segment):
        mapped = map_shared(table.memory.descriptor, table.memory.size, writable=True)
        return torch.from_numpy(mapped).view(table.records.shape)
    if table.memory is not None:
        table.words.zero_()  # pages come from the CPU's threads, and not one by one from copies
    return table.records


def fill(records: Tensor, layout: RecordLayout, device: torch.device) -> None:
    """Random rows into ``records`` uint8 ``[rows, nbytes]``: numbers that are finite and of moderate size, as in the
    library's other random tables. ``device``: copies them there."""
    count = min(len(records), max(1, _DRAWN // layout.nbytes))
    drawn = random_records(layout, count).to(device)
    for number, part in enumerate(records.split(count)):
        part.copy_(drawn.roll(number * _SHIFT % count, 0)[: len(part)], non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_records(layout: RecordLayout, count: int) -> Tensor:
    """Records uint8 ``[count, nbytes]``, the same at every call."""
    records = layout.empty(count)
    for first in range(0, count, _CHUNK_ROWS):
        chunk = records[first : first + _CHUNK_ROWS]
        for field in layout.fields:
            rows = range(first, first + len(chunk))
            layout.view(chunk, field).copy_(random_component(field.component, rows, 0))
    return records


def row_index(bank: MemoryBank, ids: Tensor, doc_start: Tensor | None = None) -> Tensor:
    """Which rows of the table ids ``[B, T]`` ask for, int64 ``[layers, B, T, C]``: by plain addressing, on the CPU."""
    table = store_of(bank).table
    windows = bank.addressing.windows(ids.cpu(), doc_start=doc_start)
    return torch.stack([
        bank.addressing.rows(windows, own.layer)[1] - own.first_row + table.span(own.space).start for own in bank.tables
    ])  # fmt: skip


def require_right(bank: MemoryBank, index: Tensor, found: Sequence[Tensor]) -> None:
    """Raises ``ValueError`` unless ``found``, every layer's embeddings ``[B, T, E]``, are the rows ``index``
    ``[layers, B, T, C]``, taken one by one out of the table's memory and decoded by the naive codec."""
    table = store_of(bank).table
    for own, rows, embeddings in zip(bank.tables, index, found, strict=True):
        records = torch.cat([table.records[row : row + 1] for row in rows.flatten().tolist()]).cpu()
        keys = make_keys(own.space, rows.flatten() - table.span(own.space).start)
        values = bank.source(own).format.decode(keys, records)["value"]
        if not torch.equal(embeddings.cpu(), values.to(bank.dtype).view(embeddings.shape)):
            raise ValueError(f"The embeddings of layer {own.layer} are not the rows of the table: nothing is timed.")
