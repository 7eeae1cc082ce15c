"""Checksums of files that somebody else wrote: sha256, in a file beside them as ``sha256sum`` reads and writes it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch_engram.durable import file_digest, replacing, sync

SUMS = "SHA256SUMS"
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_MOST_THREADS = 8


def digests(files: Iterable[Path], tell: Callable[[int], None] | None = None) -> dict[Path, str]:
    """sha256 of every file, several at a time; ``tell`` hears from any thread of the bytes that were read.

    Raises ``OSError`` naming the file that cannot be read.
    """
    files = list(files)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(lambda file: file_digest(file, tell), files), strict=True))


def read_sums(folder: Path) -> dict[str, str]:
    """Checksums by file name; none where ``folder`` has no such file. Raises ``ValueError`` for a line that is none."""
    sums = {}
    for number, line in enumerate(_lines(folder), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{folder / SUMS}, line {number} is no checksum and file name: write it anew.")
        escaped, digest, name = match.groups()
        if escaped:
            name = re.sub(r"\\(.)", lambda found: {"n": "\n", "r": "\r"}.get(found[1], found[1]), name)
        sums[os.path.normpath(name)] = digest.lower()
    return sums


def write_sums(folder: Path, found: Mapping[Path, str]) -> Path:
    """Write the checksums of files in ``folder`` beside them; those that are there already stay as they are."""
    known = read_sums(folder)
    lines = [line for line in _lines(folder) if line]
    for path, digest in sorted(found.items()):
        if path.name not in known:
            name = "".join(_ESCAPES.get(letter, letter) for letter in path.name)
            lines.append(f"{'' if name == path.name else chr(92)}{digest}  {name}")
    with replacing(folder / SUMS) as file:
        file.write(os.fsencode("".join(f"{line}\n" for line in lines)))
    sync(folder)
    return folder / SUMS


def _lines(folder: Path) -> list[str]:
    """Lines end with a line feed alone, and names may be any bytes."""
    path = folder / SUMS
    return os.fsdecode(path.read_bytes()).split("\n") if path.exists() else []
