"""Memories that were trained apart, all from one memory, brought together in it, row by row.

What was learned lies in the rows that were updated since, and their counts of updates say which those are. Rows come
from files a window at a time, twice: before any row is changed, all are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torch_engram.config import nearest
from torch_engram.memory.bank import MemoryBank
from torch_engram.memory.checkpoint import facts
from torch_engram.memory.saved import NAMES, SavedMemory, table_folder
from torch_engram.memory.saved_tables import writer_of
from torch_engram.memory.tables import Table
from torch_engram.stores import FileRows, RecordLayout, RowFormat, WritableStore, check_table, make_keys
from torch_engram.stores.parts import CHUNK_ROWS

RULES = ("mean", "sum")
"""For rows that several have updated."""


class Merging:
    """What some saved memories are to bring into a bank.

    Raises ``ValueError`` for a rule that is none, a folder that holds no memory like this one, or a bank that cannot
    take rows: see :func:`~torch_engram.hub.merge_memories`.
    """

    def __init__(self, bank: MemoryBank, folders: Sequence[Path], rule: str = "mean"):
        if rule not in RULES:
            raise ValueError(f"There is no rule {rule!r}: {nearest(rule, RULES)}")
        if bank.optimizer is not None and bank.optimizer.lazy_decay:
            raise ValueError(
                f"Rows of memory {bank.name!r} owe decay that only their own run's steps tell: merge memories that "
                "were trained without lazy_decay."
            )
        if any(bank.source(table).in_use for table in bank.tables):
            raise ValueError("Steps were prefetched from this bank: apply or discard them before rows are merged in.")
        assert bank.exchange is None, "rows that are divided over ranks are merged by nobody"
        self._bank, self._rule = bank, rule
        self._writers = [writer_of(bank, table) for table in bank.tables]
        self._saved = [SavedMemory.read(folder) for folder in folders]
        own = facts(bank)
        for saved in self._saved:
            for key in own:
                if key != "name" and saved.facts[key] != own[key]:
                    raise ValueError(f"{saved.folder} holds a memory with another {NAMES[key]} than {bank.name!r}.")

    def apply(self) -> None:
        """Change the rows. Raises ``ValueError``, before any row has changed, for a file that is missing, truncated or
        damaged, and for a memory that was not trained from this one."""
        self._bank.flush()
        files = [(table, self._open(table)) for table in self._bank.tables]
        for table, opened in files:
            for window in self._windows(table, opened):
                self._require_trained_from_here(table, window)
        for (table, opened), write in zip(files, self._writers, strict=True):
            row_format = self._bank.source(table).format
            for window in self._windows(table, opened):
                keys = make_keys(table.space, window.rows)
                updated, records = merge_records(row_format, keys, window.own, window.theirs, self._rule)
                if updated.any():
                    write(window.rows[updated], records[updated])
        self._bank.flush()

    def _open(self, table: Table) -> list[FileRows]:
        layout, opened = self._bank.source(table).format.layout, []
        for saved in self._saved:
            folder, (_, manifest) = saved.folder / table_folder(table.space), saved.parts()[table.space]
            check_table(folder, manifest, table.rows, layout)
            opened.append(FileRows.saved(folder, manifest, layout))
        return opened

    def _windows(self, table: Table, opened: Sequence[FileRows]) -> Iterator[_Window]:
        """All rows that were ever updated, here or there."""
        store = self._bank.source(table).store
        assert isinstance(store, WritableStore), "there are writers"
        written = store.written(table.space)
        for first in range(0, table.rows, CHUNK_ROWS):
            last = min(first + CHUNK_ROWS, table.rows)
            begin, end = torch.searchsorted(written, torch.tensor([first, last])).tolist()
            if begin == end and all(file.is_hole(first, last) for file in opened):
                continue
            theirs = [file.read(first, last) for file in opened]
            held = torch.stack([_counts(store.layout, records) > 0 for records in theirs]).any(0)
            held[written[begin:end] - first] = True
            rows = held.nonzero().squeeze(1) + first
            own = store.fetch(make_keys(table.space, rows.to(self._bank.device))).cpu()
            yield _Window(rows, own, [records[held] for records in theirs])

    def _require_trained_from_here(self, table: Table, window: _Window) -> None:
        layout = self._bank.source(table).format.layout
        before, values = _counts(layout, window.own), _value_bytes(layout, window.own)
        for saved, records in zip(self._saved, window.theirs, strict=True):
            updates = _counts(layout, records) - before
            other = (updates < 0) | ((updates == 0) & (_value_bytes(layout, records) != values).any(1))
            if other.any():
                row = table.first_row + int(window.rows[other][0])
                raise ValueError(
                    f"{saved.folder} was not trained from memory {self._bank.name!r} as it is (see row {row:,} of "
                    f"layer {table.layer}): load the memory that it was trained from, and merge into that."
                )


@dataclass(frozen=True)
class _Window:
    """Some rows of one table, int64 ``[n]`` ascending, and their records uint8 ``[n, nbytes]``: the bank's own, and
    those of every memory that is merged."""

    rows: Tensor
    own: Tensor
    theirs: list[Tensor]


def merge_records(
    row_format: RowFormat, keys: Tensor, own: Tensor, theirs: Sequence[Tensor], rule: str
) -> tuple[Tensor, Tensor]:
    """Which rows any memory has updated, bool ``[n]``, and the records uint8 ``[n, nbytes]`` that those get.

    ``keys``: int64 ``[n]``; ``own``, ``theirs``: the records before, and of every memory after. A row that one memory
    has updated becomes that memory's, and one that several have updated that of the memory which did so most often, the
    first of them; but its value becomes what it was before + the mean of all changes, each weighted by its number of
    updates, or with ``rule`` ``sum`` their sum.
    """
    before = _counts(row_format.layout, own)
    updates = torch.stack([_counts(row_format.layout, records) for records in theirs]) - before  # [memories, n]
    records = torch.stack(list(theirs))[updates.argmax(0), torch.arange(len(keys))]
    several = (updates > 0).sum(0) > 1
    if several.any():
        keys, weights = keys[several], updates[:, several, None].float()
        weights = weights / weights.sum(0) if rule == "mean" else (weights > 0).float()
        start = row_format.decode(keys, own[several])["value"]
        changes = [row_format.decode(keys, each[several])["value"] - start for each in theirs]
        planes = row_format.decode(keys, records[several])
        planes["value"] = start + (weights * torch.stack(changes)).sum(0)
        records[several] = row_format.encode(keys, planes)
    return (updates > 0).any(0), records


def _counts(layout: RecordLayout, records: Tensor) -> Tensor:
    """Updates of every row, int64 ``[n]``."""
    (count,) = (field for field in layout.fields if field.plane == "count")
    return layout.view(records, count)[:, 0].long()


def _value_bytes(layout: RecordLayout, records: Tensor) -> Tensor:
    """uint8 ``[n, bytes]``."""
    return torch.cat([records[:, field.start : field.stop] for field in layout.fields if field.plane == "value"], dim=1)
