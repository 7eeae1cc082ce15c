"""A bank on disk: its tables, and everything that says what the rows mean.

- ``memory.json``: name, configuration, layouts (multipliers, primes), codec, seed, digests, each table's manifest, and
  the running sums that lazy decay is paid by, where rows decay lazily;
- ``canonical-<digests>.safetensors``: the canonical vocabulary (scheme ``engram``);
- ``table-00/`` and so on: the parts of each table, named by their content.

``memory.json`` is written last and alone says what belongs to the memory, so a save into a folder that holds one
already takes its place at once and whole. The meaning travels with the rows: layouts are read back, never derived
again, and a bank refuses rows of another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from torch_engram.durable import alone_in, is_left_over, replacing, sync
from torch_engram.memory.bank import MemoryBank
from torch_engram.memory.file_tables import IN_PLACE, NEVER_WRITTEN
from torch_engram.memory.placement import StoreFactory
from torch_engram.memory.saved import FACTS, NAMES, SavedMemory, canonical_file, table_folder
from torch_engram.memory.saved_tables import SavedTables, saved_tables
from torch_engram.stores import (
    DiskStore,
    FileRows,
    Manifest,
    RecordLayout,
    Store,
    WritableStore,
    parts_in,
    planes_of,
)


def save_bank(bank: MemoryBank, directory: Path, since: Path | None = None, *, touched_only: bool = False) -> None:
    """Write the bank into ``directory``, streaming. Until the end, what the folder held before stays whole.

    ``since``: a folder that the bank was saved to or loaded from; by default ``directory`` itself. Where it holds just
    what the bank's changes are counted from, only they are written: what else is there stays, or is linked to.
    ``touched_only``: leave out the rows that no step has changed, which are as a new bank has them; the others are
    written anew at each save, and are not read in place. Two processes of one machine save into a folder one after the
    other. A bank that is divided over ranks is saved by all of them, into one folder that all see. Raises ``OSError``
    when the disk is full, and ``ValueError`` when the bank lacks planes, such as moments, of that folder's memory, or
    its rows are those of tables in files.
    """
    if bank.in_files:
        raise ValueError(f"Memory {bank.name!r} only reads its tables, and holds no row of its own: copy their files.")
    tables = saved_tables(bank)
    with ExitStack() as held:
        with tables.together():
            bank.flush()
            if tables.leads:
                directory.mkdir(parents=True, exist_ok=True)
                held.enter_context(alone_in(directory, wait=True))
        before = _files(directory)
        try:
            earlier = _earlier(bank, since or directory, directory, tables)
            manifests = [
                manifest.to_dict() for manifest in _write_tables(bank, directory, earlier, tables, touched_only)
            ]
            content = {**facts(bank), **_decay(bank), "tables": manifests}
            data = json.dumps(content, indent=1).encode()
            with tables.together():
                if tables.leads:
                    _write_facts(bank, directory, content, data)
        except OSError:  # a full disk should not stay full for parts that nobody can use
            if tables.leads:
                _remove(_files(directory) - before)
            raise
        with tables.together():
            if tables.leads:
                saved = SavedMemory.read(directory)
                _remove(_files(directory) - saved.checksums().keys() - {directory / canonical_file(content)})
        _settle(bank, hashlib.sha256(data).hexdigest())


def _write_tables(
    bank: MemoryBank, directory: Path, earlier: SavedMemory | None, tables: SavedTables, touched_only: bool
) -> Iterator[Manifest]:
    """Every table's."""
    for number, table in enumerate(bank.tables):
        folder, source = directory / table_folder(table.space), bank.source(table)
        before = None
        if earlier is not None and isinstance(source.store, WritableStore):
            before = earlier.tables[number]
            lost = before.planes.keys() - planes_of(source.format.layout)
            if lost:
                raise ValueError(
                    f"{directory} also holds {', '.join(sorted(lost))}, which this bank would lose: save to another "
                    "folder, or open it with the row optimiser that it was trained with."
                )
        if touched_only:
            yield tables.save_touched(folder, table)
        elif before is not None:
            yield tables.update(folder, table, before)
        else:
            yield tables.save(folder, table)


def _decay(bank: MemoryBank) -> dict[str, Any]:
    """What the rows' ``last`` counts in."""
    optimizer = bank.optimizer
    return {"owed_decay": optimizer.owed_decay} if optimizer is not None and optimizer.lazy_decay else {}


def _write_facts(bank: MemoryBank, directory: Path, content: dict[str, Any], data: bytes) -> None:
    """Say last what the memory consists of; ``data``: ``content`` as it is written."""
    if bank.addressing.vocab is not None:
        bank.addressing.vocab.save(directory / canonical_file(content))
    sync(directory)
    with replacing(directory / FACTS) as file:
        file.write(data)
    sync(directory)


def _earlier(bank: MemoryBank, since: Path, directory: Path, tables: SavedTables) -> SavedMemory | None:
    """What ``since`` holds, where the bank's stores count their changes from just that; its parts are in ``directory``
    then, too."""
    found = _counted_from(bank, since)
    if not tables.all(found is not None) or found is None:
        return None
    if since.resolve() == directory.resolve():
        return found
    return found if tables.all(not tables.leads or _linked(found, directory)) else None


def _linked(saved: SavedMemory, directory: Path) -> bool:
    """Give the parts of ``saved``, which nobody changes, a second name in ``directory``; False where that cannot be."""
    try:
        for path in saved.checksums():
            other = directory / path.relative_to(saved.folder)
            other.parent.mkdir(exist_ok=True)
            if not other.exists():
                os.link(path, other)
    except OSError:  # another file system, or one without links
        return False
    return True


def _counted_from(bank: MemoryBank, folder: Path) -> SavedMemory | None:
    """What ``folder`` holds, where the bank's stores count their changes from just that."""
    if not (folder / FACTS).exists() or bank.saved is None:
        return None
    try:
        saved = SavedMemory.read(folder)
    except ValueError:  # to be replaced
        return None
    return saved if bank.saved == (saved.digest, _counts(bank)) else None


def _settle(bank: MemoryBank, digest: str) -> None:
    """The bank's rows are those of the memory with this digest: count changes from here on."""
    for store in _stores(bank):
        store.forget_changes()
    bank.saved = digest, _counts(bank)


def _counts(bank: MemoryBank) -> tuple[int, ...]:
    """Since when each store counts; another bank that shares one may have made it forget."""
    return tuple(store.counts_from for store in _stores(bank))


def _stores(bank: MemoryBank) -> list[WritableStore]:
    """Each once."""
    stores = {id(bank.source(table).store): bank.source(table).store for table in bank.tables}
    return [store for store in stores.values() if isinstance(store, WritableStore)]


def _files(directory: Path) -> set[Path]:
    """Everything in ``directory`` that is named as a save names its files, but for :data:`memory.json`."""
    found = {path for path in directory.iterdir() if _CANONICAL.fullmatch(path.name) or is_left_over(path, FACTS)}
    for folder in directory.iterdir():
        if _TABLE.fullmatch(folder.name) and folder.is_dir():
            found |= parts_in(folder)
    return found


def _remove(paths: set[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def load_bank(bank: MemoryBank, directory: Path) -> None:
    """Fill ``bank`` with saved rows. Raises ``ValueError`` naming what differs, before any row has changed, or the file
    that is damaged."""
    saved, mine = SavedMemory.read(directory), facts(bank)
    for key, value in mine.items():
        if saved.facts[key] != value:
            raise ValueError(f"{directory} holds a memory with another {NAMES[key]}: build the bank with open_bank().")
    if any(bank.source(table).in_use for table in bank.tables):
        raise ValueError("Steps were prefetched from this bank: apply or discard them before loading other rows.")
    if len(saved.tables) != len(bank.tables):
        raise ValueError(f"{directory / FACTS} does not name the parts of its tables: use an intact copy.")
    tables = saved_tables(bank)
    with tables.together():
        for table, manifest in zip(bank.tables, saved.tables, strict=True):
            tables.check(directory / table_folder(table.space), table, manifest)
    if bank.optimizer is not None and bank.optimizer.lazy_decay:
        bank.optimizer.load_owed_decay(saved.owed_decay)
    bank.saved = None
    with tables.together():
        for table, manifest in zip(bank.tables, saved.tables, strict=True):
            tables.load(directory / table_folder(table.space), table, manifest)
        bank.flush()
    bank.origin = saved.digest
    _settle(bank, saved.digest)


def open_bank(directory: Path, **options: Any) -> MemoryBank:
    """A bank as it was saved. ``options``: ``optimizer``, ``placement``, ``device``, ``dtype`` as for
    :class:`MemoryBank`; without ``optimizer`` the bank is for reading only.

    With ``placement`` ``disk`` or ``disk-direct`` the rows are read where they are: nothing is loaded, and checksums
    are not compared, which ``engram table verify`` does.
    """
    saved = SavedMemory.read(directory)
    facts, vocab, config, layouts = saved.facts, saved.vocab, saved.config, saved.layouts
    in_place = IN_PLACE.get(str(options.get("placement")))
    if in_place is not None:
        if options.get("optimizer") is not None:
            raise ValueError(NEVER_WRITTEN)
        options["placement"] = _in_place(saved, in_place)
    bank = MemoryBank(
        config, vocab, name=facts["name"], codec=facts["codec"], seed=facts["seed"], layouts=layouts, **options
    )
    if in_place is None:
        load_bank(bank, directory)
    return bank


def _in_place(saved: SavedMemory, direct: bool) -> StoreFactory:
    """A store of the rows that a memory's folder holds."""
    manifests = {table.space: manifest for table, manifest in saved.parts()}
    if any(manifest.touched is not None for manifest in manifests.values()):
        raise ValueError(
            f"{saved.folder} holds touched rows alone, which are not read in place: load it with another placement, or "
            "save it whole."
        )

    def make(layout: RecordLayout, spaces: Mapping[int, int], device: torch.device) -> Store:
        rows = {space: FileRows.saved(saved.folder / table_folder(space), manifests[space], layout) for space in spaces}
        return DiskStore(rows, direct)

    return make


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


_TABLE = re.compile(r"table-\d{2,}")
_CANONICAL = re.compile(r"canonical-[0-9a-f]{16}\.safetensors(\.[0-9a-f]{8}\.tmp)?")
