"""The values of a saved memory's tables as they are read to be written anew: those of rows that never were, too."""

from __future__ import annotations

from pathlib import Path

from torch_engram.memory.saved import FACTS, SavedMemory, table_folder
from torch_engram.stores import FileRows, Plane, RecordLayout, RowFormat
from torch_engram.stores.codecs import VALUE_CODECS
from torch_engram.stores.layouts import plain_name
from torch_engram.stores.open_files import OpenFile
from torch_engram.stores.row_sources import RowSource


def saved_rows(folder: Path) -> list[RowSource]:
    """Every table of a saved memory; a layer's are numbered where its orders have rows of several widths.

    Raises ``ValueError`` as :class:`SavedMemory` does, or naming the part that is damaged.
    """
    facts = OpenFile(folder / FACTS)
    saved = SavedMemory.read(folder)
    facts.require_in_place()
    codec = saved.facts["codec"]
    if codec not in VALUE_CODECS:
        raise ValueError(f"{facts.path} says no codec that is known: use an intact copy.")
    found = []
    for table, manifest in saved.parts():
        layout = RecordLayout((Plane("value", table.dim, codec), Plane("count", 1, "int32")))
        rows = FileRows.saved(folder / table_folder(table.space), manifest, layout)
        row_format = RowFormat(layout, saved.facts["seed"], saved.config.init_std)
        beside = [other.space for other, _ in saved.parts() if other.layer == table.layer]
        number = beside.index(table.space) if len(beside) > 1 else None
        name = plain_name(table.layer, number)
        found.append(RowSource(rows, row_format, name, "plain", table.layer, table.space, (facts,)))
    return found
