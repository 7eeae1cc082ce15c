"""A bank on disk: its tables, and everything that says what the rows mean.

- ``memory.json``: name, configuration, layouts (multipliers, primes), codec, seed, digests, and each table's manifest;
- ``canonical-<digest>.safetensors``: the canonical vocabulary (scheme ``engram``);
- ``table-00/`` and so on: the parts of each table, named by their content.

``memory.json`` is written last and alone says what belongs to the memory, so a save into a folder that holds one
already takes its place at once and whole. The meaning travels with the rows: layouts are read back, never derived
again, and a bank refuses rows of another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_engram.addressing import CanonicalVocab, LayerLayout
from torch_engram.config import EngramConfig
from torch_engram.durable import file_digest, sync, write_json
from torch_engram.memory.bank import MemoryBank
from torch_engram.memory.rows import Table
from torch_engram.stores import (
    Manifest,
    WritableStore,
    check_table,
    load_table,
    make_keys,
    remove_parts,
    save_table,
    update_table,
)

_FACTS = "memory.json"


def save_bank(bank: MemoryBank, directory: Path) -> None:
    """Write the bank into ``directory``, streaming. Until the end, what the folder held before stays whole.

    Into the folder that the bank was last saved to or loaded from go only the rows that changed since.
    Raises ``OSError`` when the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    bank.flush()
    try:
        content = {**facts(bank), "tables": [manifest.to_dict() for manifest in _write_tables(bank, directory)]}
        if bank.addressing.vocab is not None:
            bank.addressing.vocab.save(directory / _canonical(content))
        sync(directory)
        write_json(directory / _FACTS, content)
        sync(directory)
    finally:  # after a full disk, too: it should not stay full for parts that nobody can use
        _remove_strays(directory)
    _settle(bank, directory)


def _write_tables(bank: MemoryBank, directory: Path) -> Iterator[Manifest]:
    earlier: list[Manifest] = []
    if (directory / _FACTS).exists() and bank.saved == _identity(directory):
        earlier = _read_manifests(directory, _read_facts(directory))
    for number, table in enumerate(bank.tables):
        folder, source = directory / _folder(table.space), bank.source(table)
        layout, read = source.format.layout, _reader(bank, table)
        if earlier and isinstance(source.store, WritableStore):
            yield update_table(folder, earlier[number], source.store.changed(table.space), layout, read)
        else:
            yield save_table(folder, table.rows, layout, read)


def _settle(bank: MemoryBank, directory: Path) -> None:
    """The bank's rows are those of ``directory``: count changes from here on."""
    for table in bank.tables:
        store = bank.source(table).store
        if isinstance(store, WritableStore):
            store.forget_changes()
    bank.saved = _identity(directory)


def _identity(directory: Path) -> tuple[Path, str]:
    return directory.resolve(), file_digest(directory / _FACTS)


def _remove_strays(directory: Path) -> None:
    """Remove parts and vocabularies that :data:`memory.json` does not name."""
    try:
        saved = _read_facts(directory)
        manifests = enumerate(_read_manifests(directory, saved))
        kept = {_folder(space): {part.file for part in manifest.parts} for space, manifest in manifests}
        canonical = _canonical(saved)
    except ValueError:
        kept, canonical = {}, ""
    for folder in directory.glob("table-*"):
        remove_parts(folder, kept.get(folder.name, ()))
    for path in directory.glob("canonical-*.safetensors*"):
        if path.name != canonical:
            path.unlink()


def load_bank(bank: MemoryBank, directory: Path) -> None:
    """Fill ``bank`` with saved rows. Raises ``ValueError`` naming what differs, before any row has changed, or the file
    that is damaged."""
    saved, mine = _read_facts(directory), facts(bank)
    for key, value in mine.items():
        if saved[key] != value:
            raise ValueError(f"{directory} holds a memory with another {_NAMES[key]}: build the bank with open_bank().")
    if any(bank.source(table).in_use for table in bank.tables):
        raise ValueError("Steps were prefetched from this bank: apply or discard them before loading other rows.")
    manifests = _read_manifests(directory, saved)
    if len(manifests) != len(bank.tables):
        raise ValueError(f"{directory / _FACTS} does not name the parts of its tables: use an intact copy.")
    for table, manifest in zip(bank.tables, manifests, strict=True):
        check_table(directory / _folder(table.space), manifest, table.rows, bank.source(table).format.layout)
    for table, manifest in zip(bank.tables, manifests, strict=True):
        layout = bank.source(table).format.layout
        load_table(directory / _folder(table.space), manifest, layout, _writer(bank, table))
    bank.flush()
    _settle(bank, directory)


def open_bank(directory: Path, **options: Any) -> MemoryBank:
    """A bank as it was saved. ``options``: ``optimizer``, ``placement``, ``device``, ``dtype`` as for
    :class:`MemoryBank`; without ``optimizer`` the bank is for reading only."""
    saved = _read_facts(directory)
    path = directory / _canonical(saved)
    try:
        vocab = CanonicalVocab.load(path) if saved["canonical_digest"] else None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): use an intact copy.") from error
    if vocab is not None and vocab.digest != saved["canonical_digest"]:
        raise ValueError(f"{path} is not the vocabulary of this memory: use an intact copy.")
    config, layouts = EngramConfig.from_dict(saved["config"]), _read_layouts(directory, saved)
    if list(layouts) != list(config.layers):
        raise ValueError(f"{directory / _FACTS} has no layout for each layer of its configuration: use an intact copy.")
    bank = MemoryBank(
        config, vocab, name=saved["name"], codec=saved["codec"], seed=saved["seed"], layouts=layouts, **options
    )
    load_bank(bank, directory)
    return bank


def facts(bank: MemoryBank) -> dict[str, Any]:
    """What a bank's rows mean, JSON-ready."""
    vocab = bank.addressing.vocab
    return {
        "name": bank.name,
        "config": bank.config.to_dict(),
        "layouts": [layout.to_dict() for layout in bank.addressing.layouts.values()],
        "codec": bank.codec,
        "seed": bank.seed,
        "canonical_digest": vocab.digest if vocab is not None else None,
        "tokenizer_digest": vocab.tokenizer_digest if vocab is not None else None,
    }


_NAMES = {
    "name": "name",
    "config": "configuration",
    "layouts": "layout (multipliers or primes)",
    "codec": "codec",
    "seed": "seed of initial rows",
    "canonical_digest": "canonical vocabulary",
    "tokenizer_digest": "tokenizer",
}


def _read_facts(directory: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = json.loads((directory / _FACTS).read_text())
        {key: saved[key] for key in (*_NAMES, "tables")}
        return saved
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} is not a saved memory (no readable {_FACTS}): give the saved folder.") from error


def _read_layouts(directory: Path, saved: dict[str, Any]) -> dict[int, LayerLayout]:
    try:
        return {layout["layer"]: LayerLayout.from_dict(layout) for layout in saved["layouts"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{directory / _FACTS} holds no layouts that can be read: use an intact copy.") from error


def _read_manifests(directory: Path, saved: Mapping[str, Any]) -> list[Manifest]:
    """One a table, in the order of their spaces."""
    try:
        return [Manifest.from_dict(content) for content in saved["tables"]]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / _FACTS} does not name the parts of its tables: use an intact copy.") from error


def _canonical(saved: Mapping[str, Any]) -> str:
    return f"canonical-{str(saved['canonical_digest'])[:16]}.safetensors"


def _folder(space: int) -> str:
    return f"table-{space:02d}"


def _reader(bank: MemoryBank, table: Table) -> Callable[[Tensor], Tensor]:
    store = bank.source(table).store
    return lambda rows: store.fetch(make_keys(table.space, rows.to(bank.device)))


def _writer(bank: MemoryBank, table: Table) -> Callable[[Tensor, Tensor], None]:
    source = bank.source(table)
    store = source.store
    if not isinstance(store, WritableStore):
        raise ValueError(f"{type(store).__name__} is read-only: rows cannot be loaded into it.")

    def write(rows: Tensor, records: Tensor) -> None:
        source.newest = store.write(make_keys(table.space, rows.to(bank.device)), records.to(bank.device))

    return write
