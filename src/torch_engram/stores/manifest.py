"""What a saved table consists of: its parts, in the order in which they are laid over each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch_engram.stores.records import Field, RecordLayout
from torch_engram.stores.tensor_files import DTYPE_NAMES


@dataclass(frozen=True)
class Part:
    """One immutable file of rows, named by its content."""

    file: str
    rows: int
    sha256: str
    first: int | None
    """The first of its consecutive rows; None for a file of changes, which lists its rows itself."""


@dataclass(frozen=True)
class Manifest:
    """Parts of consecutive rows that cover the table, then changes, of which a later one overrides an earlier."""

    rows: int
    planes: Mapping[str, tuple[str, int]]
    """Type and width of every tensor in every part."""
    parts: tuple[Part, ...] = field(default=())
    touched: int | None = None
    """Where all parts are changes, how many rows they hold: all others are zeros, and in no file."""

    @property
    def changes(self) -> tuple[Part, ...]:
        """The parts that list their rows."""
        return tuple(part for part in self.parts if part.first is None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; inverse of :meth:`from_dict`."""
        planes = {name: list(kind) for name, kind in self.planes.items()}
        content = {"rows": self.rows, "planes": planes, "parts": [asdict(part) for part in self.parts]}
        return content if self.touched is None else {**content, "touched": self.touched}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Manifest:
        """Raises ``ValueError`` when it is no manifest, or its parts leave rows out."""
        try:
            planes = {name: (str(dtype), int(width)) for name, (dtype, width) in content["planes"].items()}
            parts = tuple(Part(**part) for part in content["parts"])
            manifest = cls(int(content["rows"]), planes, parts, content.get("touched"))
            whole = manifest._covers() and all(
                Path(part.file).name == part.file and part.sha256 for part in manifest.parts
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"This is no table's manifest ({error!r}).") from error
        if not whole:
            raise ValueError("This manifest does not name parts for all of its rows.")
        return manifest

    def _covers(self) -> bool:
        """Whether the parts of consecutive rows follow each other from the first row to the last, changes after; or
        there are as many touched rows as are said."""
        if self.touched is not None:
            return sum(part.rows for part in self.changes) == self.touched and self.changes == self.parts
        reached, changes = 0, False
        for part in self.parts:
            changes = changes or part.first is None
            if not changes:
                if part.first != reached:
                    return False
                reached += part.rows
            elif part.first is not None:
                return False
        return reached == self.rows


def planes_of(layout: RecordLayout) -> dict[str, tuple[str, int]]:
    """The tensors that a part of this layout holds."""
    return {tensor_name(field): (DTYPE_NAMES[field.component.dtype], field.component.width) for field in layout.fields}


def tensor_name(field: Field) -> str:
    """A plane's own name for its value, ``moment.scale`` for another component."""
    return field.plane if field.component.name == "value" else f"{field.plane}.{field.component.name}"
