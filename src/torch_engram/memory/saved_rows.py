"""The values of a saved memory's tables, read in place row after row: what was changed over what was saved whole."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torch_engram.memory.saved import FACTS, SavedMemory, table_folder
from torch_engram.memory.tables import Table
from torch_engram.stores import CODECS, Manifest, Plane, RecordLayout, RowFormat, make_keys, planes_of
from torch_engram.stores.layouts import plain_name
from torch_engram.stores.manifest import Part, tensor_name
from torch_engram.stores.parts import ROW_TENSOR
from torch_engram.stores.steady_files import SteadyFile
from torch_engram.stores.tensor_files import TensorPlace, read_header


@dataclass(frozen=True)
class _PartRows:
    """One part: its file and the tensors in it."""

    part: Part
    file: SteadyFile
    tensors: dict[str, TensorPlace]

    def wanted(self, rows: range) -> tuple[range, Tensor]:
        """Which of its own rows are among ``rows``, and where there: int64, one for each."""
        if self.part.first is not None:
            first = max(rows.start, self.part.first)
            last = max(first, min(rows.stop, self.part.first + self.part.rows))
            return range(first - self.part.first, last - self.part.first), torch.arange(first, last) - rows.start
        own = range(self._reaches(rows.start), self._reaches(rows.stop))
        places = self._listed(own) - rows.start
        if len(own) and not (places[0] >= 0 and places[-1] < len(rows) and (places.diff() > 0).all()):
            raise ValueError(f"{self.file.path} lists rows out of order: use an intact copy of the memory.")
        return own, places

    def read(self, name: str, own: range) -> Tensor:
        """Its own rows of one tensor: uint8 ``[len(own), bytes]``."""
        place = self.tensors[name]
        into = torch.empty(len(own), place.nbytes // max(1, place.shape[0]), dtype=torch.uint8)
        self.file.read_rows(into, place, own.start)
        return into

    def _reaches(self, row: int) -> int:
        """The first of its own rows, which ascend, that is ``row`` or after it."""
        return bisect_left(range(self.part.rows), row, key=lambda own: int(self._listed(range(own, own + 1))))

    def _listed(self, own: range) -> Tensor:
        """Rows of the table, as a part of changes names them."""
        return self.read(ROW_TENSOR, own).view(torch.int64).squeeze(1)


class SavedRows:
    """One table of a saved memory, as :class:`~torch_engram.stores.row_sources.RowSource` reads it.

    Raises ``ValueError`` naming the part that does not hold what the memory says.
    """

    layout = "plain"

    def __init__(self, saved: SavedMemory, table: Table, manifest: Manifest, name: str, facts: SteadyFile):
        self.name, self.layer, self.rows, self.width = name, table.layer, table.rows, table.dim
        self.codec = str(saved.facts["codec"])
        planes = Plane("value", table.dim, self.codec), Plane("count", 1, "int32")
        self._format = RowFormat(RecordLayout(planes), saved.facts["seed"], saved.config.init_std)
        self._space = table.space
        folder = saved.folder / table_folder(table.space)
        self._parts = [_open(folder / part.file, part, self._format.layout) for part in manifest.parts]
        self.files = [facts, *(part.file for part in self._parts)]

    def read(self, rows: range) -> tuple[Tensor, ...]:
        """The components of values: those written last, and those of rows that never were."""
        fields = {tensor_name(field): field.component for field in self._format.layout.fields}
        read = {name: torch.empty(len(rows), part.nbytes, dtype=torch.uint8) for name, part in fields.items()}
        for part in self._parts:
            own, places = part.wanted(rows)
            for name, into in read.items() if own else ():
                into[places] = part.read(name, own)
        fresh = read.pop("count").view(torch.int32) == 0
        if self._format.init_std and fresh.any():
            initial = self._format.initial(make_keys(self._space, torch.arange(rows.start, rows.stop)))
            for into, value in zip(read.values(), initial, strict=True):
                into.copy_(torch.where(fresh, value.contiguous().view(torch.uint8), into))
        return tuple(into.view(fields[name].dtype) for name, into in read.items())


def saved_rows(folder: Path) -> list[SavedRows]:
    """Every table of a saved memory; a layer's are numbered where its orders have rows of several widths.

    Raises ``ValueError`` as :class:`SavedMemory` does, or naming the part that is damaged.
    """
    facts = SteadyFile(folder / FACTS)
    saved = SavedMemory.read(folder)
    facts.require_unchanged()
    if saved.facts["codec"] not in CODECS:
        raise ValueError(f"{facts.path} says no codec that is known: use an intact copy.")
    found = []
    for table, manifest in saved.parts():
        beside = [other.space for other, _ in saved.parts() if other.layer == table.layer]
        number = beside.index(table.space) if len(beside) > 1 else None
        found.append(SavedRows(saved, table, manifest, plain_name(table.layer, number), facts))
    return found


def _open(path: Path, part: Part, layout: RecordLayout) -> _PartRows:
    try:
        file = SteadyFile(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): use an intact copy of the memory.") from error
    tensors = read_header(path)
    listed = {ROW_TENSOR: ("I64", (part.rows,))} if part.first is None else {}
    planes = {name: (kind, (part.rows, width)) for name, (kind, width) in planes_of(layout).items()}
    for name, kind in [*listed.items(), *planes.items()]:
        if name not in tensors or (tensors[name].dtype, tensors[name].shape) != kind:
            raise ValueError(f"{path} does not hold {name!r} of {part.rows} rows: use an intact copy of the memory.")
    return _PartRows(part, file, tensors)
