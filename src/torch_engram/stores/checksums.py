"""Checksums of files that somebody else wrote: sha256, in a file beside them as ``sha256sum`` reads and writes it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch_engram.durable import file_digest, replacing, sync

SUMS = "SHA256SUMS"
_LINE = re.compile(r"\\?([0-9a-fA-F]{64}) [ *](.+)")
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
    path = folder / SUMS
    if not path.exists():
        return {}
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{path}, line {number} is no checksum and file name: write it anew.")
        sums[match[2]] = match[1].lower()
    return sums


def write_sums(folder: Path, found: Mapping[Path, str]) -> Path:
    """Write the checksums of files in ``folder`` beside them; those of other files stay."""
    sums = read_sums(folder) | {path.name: digest for path, digest in found.items()}
    with replacing(folder / SUMS) as file:
        file.write("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode())
    sync(folder)
    return folder / SUMS
