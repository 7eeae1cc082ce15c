"""Records: the planes of one row, packed into bytes. What stores keep and move; what optimisers see is decoded.

A table is named planes over one row space. ``value`` is what the network reads, ``count`` how often a row was
updated, the others belong to the row optimiser. A record holds all of them side by side, so a row is written whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torch_engram.stores.codecs import CODECS, Component
from torch_engram.stores.counter import counter_bits, initial_rows

SPACE_SHIFT = 40
ROW_MASK = (1 << SPACE_SHIFT) - 1


def make_keys(space: int, rows: Tensor) -> Tensor:
    """Row ids int64 of one space to keys: space << 40 | row."""
    return rows | (space << SPACE_SHIFT)


@dataclass(frozen=True)
class Plane:
    """One quantity of every row: ``width`` numbers in a codec."""

    name: str
    width: int
    codec: str = "fp32"


@dataclass(frozen=True)
class Field:
    """Where one component of one plane lies in a record."""

    plane: str
    component: Component
    start: int

    @property
    def stop(self) -> int:
        """First byte after the field."""
        return self.start + self.component.nbytes


@dataclass(frozen=True)
class RecordLayout:
    """The planes of a table and the bytes of its records."""

    planes: tuple[Plane, ...]

    def plane(self, name: str) -> Plane:
        """The plane of this name; an ``assert`` fails when there is none."""
        found = [plane for plane in self.planes if plane.name == name]
        assert found, f"no plane {name!r} among {[plane.name for plane in self.planes]}"
        return found[0]

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """Every component in order, each aligned to its element."""
        fields, at = [], 0
        for plane in self.planes:
            for component in CODECS[plane.codec].components(plane.width):
                at = -(-at // component.dtype.itemsize) * component.dtype.itemsize
                fields.append(Field(plane.name, component, at))
                at += component.nbytes
        return tuple(fields)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a record: padded to a multiple of 16, the widest access of a GPU, or of 8 if it is short."""
        size = self.fields[-1].stop
        unit = 16 if size > 64 else 8
        return -(-size // unit) * unit

    @cached_property
    def gaps(self) -> tuple[slice, ...]:
        """The bytes of a record that are no field's."""
        starts = [0, *(field.stop for field in self.fields)]
        stops = [*(field.start for field in self.fields), self.nbytes]
        return tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop)

    def view(self, records: Tensor, field: Field) -> Tensor:
        """One component of uint8 records ``[U, nbytes]``, without a copy: ``[U, component.width]``."""
        return records[:, field.start : field.stop].view(field.component.dtype)

    def empty(self, rows: int, device: torch.device | str = "cpu") -> Tensor:
        """Zeroed records uint8 ``[rows, nbytes]``."""
        return torch.zeros(rows, self.nbytes, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class RowFormat:
    """Records to numbers and back, for a table whose untouched rows are a function of (seed, key, column)."""

    layout: RecordLayout
    seed: int = 0
    init_std: float = 0.0

    def decode(self, keys: Tensor, records: Tensor) -> dict[str, Tensor]:
        """The planes of records ``[U, nbytes]``: each ``[U, width]``, fp32 (integers int32).

        A row whose ``count`` is 0 was never written and gets its initial value.
        """
        planes = {}
        for plane in self.layout.planes:
            parts = tuple(self.layout.view(records, f) for f in self.layout.fields if f.plane == plane.name)
            planes[plane.name] = CODECS[plane.codec].decode(parts)
        if self.init_std and "count" in planes:
            fresh = self._initial(keys)
            planes["value"] = torch.where(planes["count"] == 0, fresh, planes["value"])
        return planes

    def encode(self, keys: Tensor, planes: Mapping[str, Tensor]) -> Tensor:
        """Inverse of :meth:`decode`: uint8 ``[U, nbytes]``. Stochastic rounding draws from (seed, plane, key, the
        row's count, column), so the same update gives the same bytes under every placement."""
        records = self.layout.empty(keys.numel(), keys.device)
        draws = planes["count"].reshape(-1).to(torch.int64) if "count" in planes else 0
        for number, plane in enumerate(self.layout.planes):
            codec = CODECS[plane.codec]
            noise = counter_bits(self.seed, keys, draws, plane.width, number) if codec.stochastic else None
            fields = [f for f in self.layout.fields if f.plane == plane.name]
            for field, part in zip(fields, codec.encode(planes[plane.name], noise), strict=True):
                self.layout.view(records, field).copy_(part)
        return records

    def initial(self, keys: Tensor) -> tuple[Tensor, ...]:
        """The components of the values of rows that were never written."""
        plane = self.layout.plane("value")
        return CODECS[plane.codec].encode(initial_rows(self.seed, keys, plane.width, self.init_std))

    @property
    def has_unwritten(self) -> bool:
        """Whether records tell that their row was never written."""
        return bool(self.init_std) and any(plane.name == "count" for plane in self.layout.planes)

    def with_initial(self, keys: Tensor, records: Tensor) -> Tensor:
        """``records`` uint8 ``[U, nbytes]``, changed in place: a row that was never written holds its initial value."""
        if self.has_unwritten:
            count = next(field for field in self.layout.fields if field.plane == "count")
            fresh = (self.layout.view(records, count) == 0).squeeze(1).nonzero().squeeze(1)
            fields = [field for field in self.layout.fields if field.plane == "value"]
            for field, part in zip(fields, self.initial(keys[fresh]), strict=True):
                records[fresh, field.start : field.stop] = part.contiguous().view(torch.uint8)
        return records

    def _initial(self, keys: Tensor) -> Tensor:
        """Initial values, already rounded as the codec stores them, so that writing a row back changes nothing."""
        return CODECS[self.layout.plane("value").codec].decode(self.initial(keys))
