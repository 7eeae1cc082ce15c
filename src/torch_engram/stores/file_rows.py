"""The rows of one table where they lie in files: the file and byte of every component of a row, and records of them.

A table may be spread over any number of tensors and files, its components (codes, scales, counts) apart. A record, as
stores move it, holds them side by side. Nothing is loaded: headers say where rows are, and rows are read in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_engram.stores.manifest import Manifest, planes_of, tensor_name
from torch_engram.stores.named_tables import NamedTable
from torch_engram.stores.open_files import OpenFile, TensorFile
from torch_engram.stores.parts import listed_rows, open_part
from torch_engram.stores.records import Field, Plane, RecordLayout
from torch_engram.stores.tensor_files import TensorPlace

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Column:
    """One component of every row: consecutive rows in every tensor, tensors in the order of their rows."""

    field: Field
    firsts: Int64s
    """First row of each of the S tensors, and the number of all rows: ``[S + 1]``."""
    files: Int64s
    """``[S]``: each one's file, a number in :attr:`FileRows.files`."""
    starts: Int64s
    """``[S]``: each one's first byte."""

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return self.field.component.nbytes

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Rows ``first`` to ``last`` by tensor: file, first byte, rows."""
        while first < last:
            tensor = int(np.searchsorted(self.firsts, first, side="right")) - 1
            stop = min(last, int(self.firsts[tensor + 1]))
            at = int(self.starts[tensor]) + (first - int(self.firsts[tensor])) * self.nbytes
            yield int(self.files[tensor]), at, stop - first
            first = stop


class FileRows:
    """A table's rows in files that are held open, read-only.

    ``places``: for every field of ``layout`` the tensors that hold it, consecutive rows, the first ones first.
    ``changed``: int64 ascending, rows that were saved again later; their newest records are ``newest``, rows past
    ``rows`` in the numbering of ``places``: 16 bytes a changed row are all that grows with the table. Where it is not
    ``whole``, the changed rows are all that is in files, and all others are zeros. Make one by :meth:`of` or
    :meth:`saved`; its files are closed when it goes.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        layout: RecordLayout,
        places: Mapping[Field, Sequence[TensorPlace]],
        files: Sequence[OpenFile],
        changed: Int64s | None = None,
        newest: Int64s | None = None,
        whole: bool = True,
    ):
        self.name, self.rows, self.layout, self.files, self.whole = name, rows, layout, list(files), whole
        number = {file.path: index for index, file in enumerate(self.files)}
        self.columns = [_column(field, found, number) for field, found in places.items()]
        """One for every field of the layout."""
        assert all(np.array_equal(column.firsts, self.columns[0].firsts) for column in self.columns), "rows lie apart"
        self._places = [np.array([getattr(column, of) for column in self.columns]) for of in ("files", "starts")]
        self._widths = np.array([[column.nbytes] for column in self.columns], np.int64)
        self._changed = np.empty(0, np.int64) if changed is None else changed
        self._newest = np.empty(0, np.int64) if newest is None else newest

    @classmethod
    def of(cls, table: NamedTable, opened: dict[Path, TensorFile] | None = None) -> FileRows:
        """The rows of a named table: records of one plane, ``value``. ``opened``: files of other tables, so that each
        is open once; this one's join them.

        Raises ``ValueError`` naming the file that is truncated, or whose header is another one by now; ``OSError`` when
        one cannot be opened.
        """
        layout = RecordLayout((Plane("value", table.width, table.codec),))
        opened = {} if opened is None else opened
        opened |= {path: TensorFile(path) for path in table.files if path not in opened}
        files = [opened[path] for path in table.files]
        found = {place for file in files for place in file.tensors.values()}
        for place in (*table.values, *table.scales):
            if place not in found:
                raise ValueError(f"{place.file} has another header than before: look for its tables again.")
        components = (table.values, table.scales) if table.scales else (table.values,)
        return cls(table.name, table.rows, layout, dict(zip(layout.fields, components, strict=True)), files)

    @classmethod
    def saved(cls, folder: Path, manifest: Manifest, layout: RecordLayout) -> FileRows:
        """The rows of a saved table, whose planes those of ``layout`` must be among; checksums are not read.

        Raises ``ValueError`` naming the part that is missing, truncated or not as it is listed, or the plane that does
        not fit; ``OSError`` when one cannot be opened.
        """
        for name, kind in planes_of(layout).items():
            if manifest.planes.get(name) != kind:
                raise ValueError(f"{folder} has no {name} of {kind[0]} [{kind[1]}]: open it with its own codec.")
        files = [open_part(folder / part.file, part, layout) for part in manifest.parts]
        places = {field: [file.tensors[tensor_name(field)] for file in files] for field in layout.fields}
        listed = [
            listed_rows(file, manifest.rows)
            for file, part in zip(files, manifest.parts, strict=True)
            if part.first is None
        ]
        whole = manifest.touched is None
        changed, newest = _last_of_each(listed, manifest.rows if whole else 0)
        return cls(folder.name, manifest.rows, layout, places, files, changed, newest, whole)

    def current(self, rows: Int64s) -> Int64s:
        """Where the newest records of rows of a whole table are, in the numbering of :attr:`columns`: most are at their
        own number."""
        if not len(self._changed):
            return rows
        at = np.searchsorted(self._changed, rows).clip(max=len(self._changed) - 1)
        return np.where(self._changed[at] == rows, self._newest[at], rows)

    def locate(self, rows: Int64s) -> tuple[Int64s, Int64s]:
        """File and first byte of every component of rows ``[n]``, as :attr:`columns` number them: two int64
        ``[C, n]``."""
        firsts, (files, starts) = self.columns[0].firsts, self._places
        tensor = firsts.searchsorted(rows, side="right") - 1
        return files.take(tensor, 1), starts.take(tensor, 1) + (rows - firsts.take(tensor)) * self._widths

    def require_rows(self, rows: Int64s) -> None:
        """Raises ``ValueError`` naming the first row that the table does not have."""
        outside = rows[(rows < 0) | (rows >= self.rows)]
        if len(outside):
            raise ValueError(
                f"Row {outside[0]:,} is not in {self.name}, which has {self.rows:,} rows: ask for 0 to "
                f"{self.rows - 1:,}, or check that the configuration is the table's."
            )

    def read(self, first: int, last: int) -> Tensor:
        """Records uint8 ``[last - first, nbytes]`` of consecutive rows.

        Raises ``ValueError`` for rows that are not there, ``OSError`` naming the file for a read error or a file that
        was changed.
        """
        shape = last - first, self.layout.nbytes
        records = torch.empty(shape, dtype=torch.uint8) if not self.layout.gaps else self.layout.empty(last - first)
        self._read(first, last, [records[:, field.start : field.stop] for field in self.layout.fields])
        return records

    def read_apart(self, first: int, last: int) -> tuple[Tensor, ...]:
        """As :meth:`read`, without a copy into records: every field's component, contiguous
        ``[last - first, component.width]``."""
        kinds = [field.component for field in self.layout.fields]
        parts = [torch.empty(last - first, kind.nbytes, dtype=torch.uint8) for kind in kinds]
        self._read(first, last, parts)
        return tuple(part.view(kind.dtype) for part, kind in zip(parts, kinds, strict=True))

    def is_hole(self, first: int, last: int) -> bool:
        """Whether consecutive rows are zeros that were never written, in no file or in holes: there is no need to read
        them. Raises ``OSError`` naming a file that was changed."""
        begin, end = np.searchsorted(self._changed, (first, last))
        if begin != end or not self.whole:
            return bool(begin == end)
        return all(
            self.files[number].is_hole(at, at + rows * column.nbytes)
            for column in self.columns
            for number, at, rows in column.pieces(first, last)
        )

    def _read(self, first: int, last: int, targets: Sequence[Tensor]) -> None:
        """Fill ``targets``, one for every column, uint8 ``[last - first, column.nbytes]``."""
        if last > first:
            self.require_rows(np.array([first, last - 1]))
        if self.whole:
            self._read_columns(first, last, targets)
        else:
            for target in targets:
                target.zero_()
        begin, end = np.searchsorted(self._changed, (first, last))
        if begin == end:
            return
        rows, newest = self._changed[begin:end] - first, self._newest[begin:end]
        part = np.searchsorted(self.columns[0].firsts, newest, side="right")
        for number in np.unique(part):  # its rows ascend: between those of [first, last) lie no others
            own = part == number
            start, stop = int(newest[own].min()), int(newest[own].max()) + 1
            found = [torch.empty(stop - start, target.shape[1], dtype=torch.uint8) for target in targets]
            self._read_columns(start, stop, found)
            for target, later in zip(targets, found, strict=True):
                target[torch.from_numpy(rows[own])] = later[torch.from_numpy(newest[own] - start)]

    def _read_columns(self, first: int, last: int, targets: Sequence[Tensor]) -> None:
        """Consecutive rows as :attr:`columns` number them."""
        for column, target in zip(self.columns, targets, strict=True):
            done = 0
            for number, at, rows in column.pieces(first, last):
                into = target[done : done + rows]
                raw = into if into.is_contiguous() else torch.empty(rows, column.nbytes, dtype=torch.uint8)
                self.files[number].read_into(at, raw.numpy().reshape(-1))
                self.files[number].require_unchanged()
                if raw is not into:
                    into.copy_(raw)
                done += rows


def _column(field: Field, places: Sequence[TensorPlace], number: Mapping[Path, int]) -> Column:
    firsts = list(accumulate((place.shape[0] for place in places), initial=0))
    return Column(
        field,
        np.array(firsts, np.int64),
        np.array([number[place.file] for place in places], np.int64),
        np.array([place.start for place in places], np.int64),
    )


def _last_of_each(listed: Sequence[Int64s], before: int) -> tuple[Int64s, Int64s]:
    """Rows that parts of changes list, each once and ascending, and where the last part that lists it has it;
    ``before``: rows in the parts before."""
    every = np.concatenate([np.empty(0, np.int64), *listed])
    changed, last = np.unique(every[::-1], return_index=True)
    return changed, before + len(every) - 1 - last
