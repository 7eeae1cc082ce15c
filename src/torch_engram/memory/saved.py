"""What a saved memory's folder says of itself, read without opening the memory: ``memory.json`` and what it names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch_engram.addressing import CanonicalVocab, LayerLayout
from torch_engram.config import EngramConfig
from torch_engram.memory.tables import Table, tables_of
from torch_engram.stores import Manifest

FACTS = "memory.json"
NAMES = {
    "name": "name",
    "config": "configuration",
    "layouts": "layout (multipliers or primes)",
    "codec": "codec",
    "seed": "seed of initial rows",
    "canonical_digest": "canonical vocabulary",
    "tokenizer_digest": "tokenizer",
}
"""What is said of a memory, and what messages call it."""


@dataclass(frozen=True)
class SavedMemory:
    """A memory's folder as its ``memory.json`` has it."""

    folder: Path
    facts: dict[str, Any]
    tables: list[Manifest]
    digest: str
    """sha256 of the very bytes that were read."""
    owed: Any = None
    """What it says of lazy decay, unread."""

    @classmethod
    def read(cls, folder: Path) -> SavedMemory:
        """Raises ``ValueError`` when there is none, or one that cannot be read."""
        path = folder / FACTS
        try:
            data = path.read_bytes()
            content = json.loads(data)
            facts = {key: content[key] for key in NAMES}
            tables = content["tables"]
        except KeyError as error:
            raise ValueError(
                f"{path} has no {error}: it is damaged, or another version's; use an intact copy."
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} is not a saved memory (no readable {FACTS}): give the saved folder.") from error
        try:
            manifests = [Manifest.from_dict(table) for table in tables]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not name the parts of its tables: use an intact copy.") from error
        return cls(folder, facts, manifests, hashlib.sha256(data).hexdigest(), content.get("owed_decay"))

    @cached_property
    def config(self) -> EngramConfig:
        """Raises ``ValueError`` for one that is none."""
        if not isinstance(self.facts["config"], dict):
            raise ValueError(f"{self.folder / FACTS} holds no configuration: use an intact copy.")
        return EngramConfig.from_dict(self.facts["config"])

    @cached_property
    def layouts(self) -> dict[int, LayerLayout]:
        """By layer. Raises ``ValueError`` when there is not one for each layer of the configuration."""
        path = self.folder / FACTS
        try:
            layouts = {layout["layer"]: LayerLayout.from_dict(layout) for layout in self.facts["layouts"]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no layouts that can be read: use an intact copy.") from error
        if list(layouts) != list(self.config.layers):
            raise ValueError(f"{path} has no layout for each layer of its configuration: use an intact copy.")
        return layouts

    @cached_property
    def vocab(self) -> CanonicalVocab | None:
        """The canonical vocabulary, if it has one. Raises ``ValueError`` when its file is missing or another one."""
        path = self.folder / canonical_file(self.facts)
        try:
            vocab = CanonicalVocab.load(path) if self.facts["canonical_digest"] else None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): use an intact copy.") from error
        if vocab is not None and vocab.digest != self.facts["canonical_digest"]:
            raise ValueError(f"{path} is not the vocabulary of this memory: use an intact copy.")
        return vocab

    @property
    def owed_decay(self) -> list[list[float]]:
        """The running sums that rows pay lazy decay by. Raises ``ValueError`` when there are none."""
        owed = self.owed
        sound = isinstance(owed, list) and all(
            isinstance(sums, list) and sums and all(type(entry) is float for entry in sums) for sums in owed
        )
        if not sound:
            raise ValueError(
                f"{self.folder / FACTS} has no running sums of the decay that its rows owe: use an intact copy."
            )
        return list(owed)

    def parts(self) -> list[tuple[Table, Manifest]]:
        """Every table with what it consists of. Raises ``ValueError`` when there are others than the memory has."""
        tables = list(tables_of(self.config, self.layouts))
        if [table.rows for table in tables] != [manifest.rows for manifest in self.tables]:
            raise ValueError(f"{self.folder / FACTS} does not name the parts of its tables: use an intact copy.")
        return list(zip(tables, self.tables, strict=True))

    def require_sound(self) -> None:
        """Raises ``ValueError`` unless its vocabulary and its tables are those that its configuration says."""
        self.parts()
        _ = self.vocab

    def checksums(self) -> dict[Path, str]:
        """sha256 of every part of every table."""
        return {
            self.folder / table_folder(space) / part.file: part.sha256
            for space, table in enumerate(self.tables) for part in table.parts
        }  # fmt: skip


def is_memory(path: Path) -> bool:
    """Whether it is a folder into which a memory was saved."""
    return (path / FACTS).exists()


def table_folder(space: int) -> str:
    """Where the parts of a table are, in the memory's folder."""
    return f"table-{space:02d}"


def canonical_file(facts: dict[str, Any]) -> str:
    """The vocabulary's file, by all that it holds: another tokenizer's may have the same map."""
    content = f"{facts['canonical_digest']} {facts['tokenizer_digest']}"
    return f"canonical-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"
