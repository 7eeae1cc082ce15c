"""The tables of a memory as they are read to be written anew, whether it is open or saved, and what its rows mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch_engram.addressing import CanonicalVocab, LayerLayout
from torch_engram.config import EngramConfig
from torch_engram.memory.bank import MemoryBank
from torch_engram.memory.saved import SavedMemory
from torch_engram.memory.saved_rows import saved_rows
from torch_engram.stores import DiskStore
from torch_engram.stores.layouts import plain_name
from torch_engram.stores.row_sources import RowSource, StoreRows


@dataclass(frozen=True)
class ReadThrough:
    """A memory that is read from its first row to its last."""

    name: str
    config: EngramConfig
    layouts: Mapping[int, LayerLayout]
    vocab: CanonicalVocab | None
    tables: list[RowSource]
    folder: Path | None
    """Where it is saved; None for one that is open, whose rows may change."""

    @classmethod
    def of(cls, memory: MemoryBank | Path) -> ReadThrough:
        """Of a bank, as its rows are, or of the folder of a saved one.

        Raises ``ValueError`` for a bank that is divided over ranks, and as :func:`saved_rows` does.
        """
        if isinstance(memory, MemoryBank):
            return _of_bank(memory)
        saved = SavedMemory.read(memory)
        return cls(saved.facts["name"], saved.config, saved.layouts, saved.vocab, saved_rows(memory), memory)


def _of_bank(bank: MemoryBank) -> ReadThrough:
    if bank.exchange is not None:
        raise ValueError(
            f"Memory {bank.name!r} is divided over ranks: save it with save_bank(), and give the saved folder."
        )
    bank.flush()
    tables = []
    for table in bank.tables:
        source = bank.source(table)
        rows = (
            source.store.tables[table.space]
            if isinstance(source.store, DiskStore)
            else StoreRows(source.store, table.space, table.rows, bank.device)
        )
        name = plain_name(table.layer)
        tables.append(RowSource(rows, source.format, name, "plain", table.layer, table.space))
    addressing = bank.addressing
    return ReadThrough(bank.name, bank.config, addressing.layouts, addressing.vocab, tables, None)
