r"""Files in, documents out: which text of a file is a document, and which files of a folder are text.

- `.txt` (also `.txt.xz`, `.txt.gz`, or no further suffix): a line holding only a form feed (`\f`) ends a document. A
  file without such a line is divided into some `SECTIONS` sections, of `SECTION_CHARACTERS` characters at most, each up
  to the next blank line or, where none comes for as long again, line end: so that one book can still be split into
  training and validation text. Joined again, the pieces are the file.
- `.jsonl` (also compressed): one document a line, its text under a field.
- any other text file (`.md`, `.py`, ...): one document in a folder; alone, it is divided as a `.txt` is.

Files are UTF-8, with or without a byte order mark; line ends are read as `\n`; blank documents are dropped.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, cast

DOCUMENT_SEPARATOR = "\f\n"
SECTIONS = 100
SECTION_CHARACTERS = 16_384
_LEAST_SECTION_CHARACTERS = 1_024

COMPRESSED_SUFFIXES = (".xz", ".gz")
_PROBE_BYTES = 65_536
_DAMAGED = (UnicodeDecodeError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError)


def read_files(paths: Iterable[Path], text_field: str) -> Iterator[str]:
    """The documents of several files, in the order given."""
    return itertools.chain.from_iterable(read_file(path, text_field) for path in paths)


def read_file(path: Path, text_field: str, *, alone: bool = False) -> Iterator[str]:
    """The documents of one file, lazily. `alone`: it is the whole corpus, so that one document would be too few.

    Raises:
        ValueError: while reading: the file is not text, or a JSONL line is not JSON or has no such text field.
    """
    suffix = path.suffix.lower()
    kind = Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix
    if kind == ".jsonl":
        documents = _json_lines(path, text_field)
    elif alone or kind in (".txt", ""):
        documents = _text_documents(path)
    else:
        documents = _whole(path)
    return (document for document in documents if document.strip())


def text_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files below a folder, sorted, hidden ones left out: those that begin as text, and those that do not."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    found = sorted(path for path in found if path.is_file())
    texts = [path for path in found if looks_like_text(path)]
    return texts, sorted(set(found) - set(texts))


def looks_like_text(path: Path) -> bool:
    """Whether the first 64 KiB, decompressed, are UTF-8 without NUL bytes."""
    try:
        with _open_bytes(path) as file:
            head = file.read(_PROBE_BYTES)
        # A probe of a longer file may end inside a character, which is no error: the decoder is told that more follows.
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _PROBE_BYTES)
    except _DAMAGED:
        return False
    return b"\0" not in head


def not_text(path: Path) -> str:
    """The sentence for a file that is not text."""
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        return f"{path} does not decompress to UTF-8 text; give a whole {path.suffix} file of text."
    return f"{path} is not UTF-8 text (it may be a binary file); give a text file, or convert it to UTF-8."


def _text_documents(path: Path) -> Iterator[str]:
    total, separated = 0, False
    for line in _lines(path):
        total += len(line)
        separated = separated or line == DOCUMENT_SEPARATOR
    section = min(max(total // SECTIONS, _LEAST_SECTION_CHARACTERS), SECTION_CHARACTERS)
    lines: list[str] = []
    length = 0
    for line in _lines(path):
        if separated and line == DOCUMENT_SEPARATOR:
            yield "".join(lines)
            lines = []
            continue
        lines.append(line)
        length += len(line)
        if not separated and (length >= 2 * section or (length >= section and not line.strip())):
            yield "".join(lines)
            lines, length = [], 0
    yield "".join(lines)


def _whole(path: Path) -> Iterator[str]:
    yield "".join(_lines(path))


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"Line {number} of {path} is not JSON ({error.msg}); write one JSON object a line."
            ) from error
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(map(repr, record)) if isinstance(record, dict) else "no fields"
            raise ValueError(
                f"Line {number} of {path} has no text under {text_field!r} (it has {fields}); pass text_field=."
            )
        yield text


def _lines(path: Path) -> Iterator[str]:
    """Lines, decompressed and decoded; bytes that are not text raise ValueError."""
    try:
        with io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig") as file:
            for line in file:
                if "\0" in line:
                    raise ValueError(not_text(path))
                yield line
    except _DAMAGED as error:
        raise ValueError(not_text(path)) from error


def _open_bytes(path: Path) -> IO[bytes]:
    openers: dict[str, Callable[[Path, str], object]] = {".xz": lzma.open, ".gz": gzip.open}
    return cast(IO[bytes], openers.get(path.suffix.lower(), open)(path, "rb"))
