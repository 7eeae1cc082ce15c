"""What a conversion that was stopped leaves behind, and how another one with the same arguments goes on from it.

Beside the table that is to be, in a folder called as it is and ``.converting``, lie the files that are written and a
journal: for which table, from which sources, which files are whole, and how far the others have come.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch_engram.durable import alone_in, make_folder, write_json
from torch_engram.stores.shard_writer import Begun

_JOURNAL = "journal.json"


@dataclass
class Journal:
    """What was done when it was last written."""

    arguments: dict[str, str]
    sources: dict[str, list[int]]
    """Their files, and the identity of each."""
    whole: dict[str, str] = field(default_factory=dict)
    """sha256 of each file that has all of its rows."""
    begun: dict[str, Begun] = field(default_factory=dict)
    """Every other one that has some."""
    renamed: bool = False
    """Whether the table had nothing left but to get its name."""


class LeftOver:
    """The folder beside ``folder``, held against other processes."""

    def __init__(self, folder: Path):
        self.path = beside(folder)
        self.table = self.path / "table"
        """Files of the new table."""

    def write(self, journal: Journal) -> None:
        """Replace the journal; all that it speaks of is on the disk."""
        write_json(self.path / _JOURNAL, asdict(journal))

    def journal(self, arguments: Mapping[str, str], sources: Mapping[str, list[int]]) -> Journal:
        """As it was left; a new one where there is none that can be read, and no file then.

        Raises ``ValueError`` naming the argument that differs, or the source that has changed since, or when the
        folder is nobody's left-over.
        """
        found = self._read()
        if found is None:
            shutil.rmtree(self.table, ignore_errors=True)
            found = Journal(dict(arguments), dict(sources))
        for name, value in arguments.items():
            if found.arguments.get(name) != value:
                raise ValueError(
                    f"{self.path} is left from another conversion ({name} was {found.arguments.get(name)}, not "
                    f"{value}): give the same arguments, or delete it."
                )
        for file, identity in sources.items():
            if found.sources.get(file) != identity:
                raise ValueError(f"{file} has changed since {self.path} was begun: delete that, and begin anew.")
        return found

    def keep_only(self, names: set[str]) -> None:
        """Remove every other file of the new table."""
        for path in self.table.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in names:
                path.unlink()

    def empty(self) -> None:
        """Begin anew, whatever it holds. Raises ``ValueError`` when it is nobody's left-over."""
        self._read()
        shutil.rmtree(self.table, ignore_errors=True)
        (self.path / _JOURNAL).unlink(missing_ok=True)

    def remove(self) -> None:
        """Whatever it holds."""
        shutil.rmtree(self.path)

    def _read(self) -> Journal | None:
        path = self.path / _JOURNAL
        others = [other for other in self.path.iterdir() if not other.name.startswith(_JOURNAL)]
        if not path.exists() and others:
            raise ValueError(f"{self.path} is no left-over of a conversion ({others[0].name}): move it away.")
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
            begun = {name: Begun(int(rows), list(digests)) for name, (rows, digests) in content["begun"].items()}
            mappings = {name: dict(content[name]) for name in ("arguments", "sources", "whole")}
            return Journal(**mappings, begun=begun, renamed=bool(content["renamed"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def beside(folder: Path) -> Path:
    """Where ``folder`` is written before it is whole."""
    return folder.with_name(f"{folder.name}.converting")


@contextmanager
def left_over(folder: Path) -> Iterator[LeftOver]:
    """What there is of ``folder``, made where there is nothing, and held.

    Raises ``ValueError`` when another process converts into it, and ``OSError`` when it cannot be made.
    """
    left = LeftOver(folder)
    make_folder(left.path)
    with ExitStack() as held:
        try:
            held.enter_context(alone_in(left.path, wait=False))
        except (BlockingIOError, FileNotFoundError) as error:
            raise ValueError(f"Another process converts into {folder}: wait for it, or give another folder.") from error
        yield left
