"""Token files: the documents of a corpus as flat arrays of tokens, read by memory map.

A folder `tokens-<key>/`, made by `tokenize_corpus`, holds, all little-endian:

    train.bin              tokens of all documents, end to end, each ended by the end token (uint16 or uint32)
    train.starts.bin       index of each document's first token (int64)
    validation.bin, validation.starts.bin
    meta.json              dtype, counts, bytes of text, and the digests of tokenizer and corpus
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

META = "meta.json"


@dataclass(frozen=True)
class TokenFile:
    """One split, memory-mapped read-only.

    Attributes:
        tokens: uint16 or uint32 [tokens], documents end to end, each ended by `end_id`.
        starts: int64 [documents], the index of each document's first token; rising, the first is 0.
        text_bytes: UTF-8 bytes of the documents' text, for bits per byte.
        vocab_size: ids that the tokenizer has.
        end_id: the token that ends each document.
        digest: hex digest that names tokenizer, corpus and split.
    """

    path: Path
    tokens: np.ndarray[Any, np.dtype[Any]] = field(repr=False)
    starts: np.ndarray[Any, np.dtype[np.int64]] = field(repr=False)
    text_bytes: int
    vocab_size: int
    end_id: int
    digest: str

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TokenFiles:
    """The token files of one corpus; `validation` is None where its share was 0."""

    folder: Path
    train: TokenFile
    validation: TokenFile | None


def open_token_files(folder: str | Path) -> TokenFiles:
    """Open a folder that `tokenize_corpus` made.

    Raises:
        ValueError: it is none, or a file's size disagrees with `meta.json`.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no meta.json; give a folder made by tokenize_corpus.") from error
    files = {split: _open_split(folder, split, meta) for split in meta["splits"]}
    return TokenFiles(folder, files["train"], files.get("validation"))


def _open_split(folder: Path, split: str, meta: dict[str, Any]) -> TokenFile:
    counts = meta["splits"][split]
    path = folder / f"{split}.bin"
    tokens = _map(path, meta["dtype"], counts["tokens"])
    starts = _map(folder / f"{split}.starts.bin", "<i8", counts["documents"])
    return TokenFile(
        path, tokens, starts, counts["text_bytes"], meta["vocab_size"], meta["end_id"], f"{folder.name}/{split}"
    )


def _map(path: Path, dtype: str, count: int) -> np.ndarray[Any, np.dtype[Any]]:
    size = path.stat().st_size if path.exists() else 0
    if size != count * np.dtype(dtype).itemsize:
        raise ValueError(
            f"{path} has {size} bytes where meta.json promises {count} values; delete its folder and tokenise again."
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))
