"""A corpus: documents from a file, a folder, the shipped corpus or a `datasets` name, as one stream.

A document is the unit that is never joined with its neighbours: memory does not look across its edges, and it lies
in the training split or in the validation split as a whole. `text_files.py` says which text of a file is a document.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from torch_engram.data.text_files import (
    COMPRESSED_SUFFIXES,
    looks_like_text,
    not_text,
    read_file,
    read_files,
    text_files,
)

Document = str
Split = Literal["train", "validation"]

_SHIPPED_CORPUS = Path(__file__).parent / "corpus"
_FILE_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".json", ".csv", ".tsv", *COMPRESSED_SUFFIXES)


@dataclass(frozen=True)
class Corpus:
    """A stream of documents that can be read any number of times.

    Attributes:
        name: what the user called it, for messages.
        read: starts a fresh pass over the documents, in a fixed order.
        skipped: files of a folder that were left out because they are not text.
    """

    name: str
    read: Callable[[], Iterator[Document]]
    skipped: tuple[Path, ...] = ()

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    @cached_property
    def digest(self) -> str:
        """Hex digest of the documents and their order, whatever files they lie in. The first use reads the corpus."""
        state = hashlib.blake2b(digest_size=32)
        for document in self:
            encoded = document.encode()
            state.update(len(encoded).to_bytes(8, "little"))
            state.update(encoded)
        return state.hexdigest()


def open_corpus(source: str | Path, *, text_field: str = "text") -> Corpus:
    """Open a source of text. Documents are read lazily: this reads the first one, to be sure that there is one.

    Args:
        source: `"demo"` (the corpus shipped with the package; write `"./demo"` for a folder of that name), a text
            file, a folder (all its text files, recursively, sorted, hidden ones left out), a folder written by
            `datasets.save_to_disk`, or a dataset: `"datasets:NAME"`, `"datasets:NAME:CONFIG"`, or a plain name where
            no such path exists. Of a dataset the `train` split is read.
        text_field: where JSONL lines and datasets keep their text.

    Raises:
        ValueError: the path does not exist, is not text, or holds no text; the text field is missing; or a dataset
            is asked for and the `datasets` package is not installed. Bytes that are not text deeper in a file than
            its first 64 KiB raise while reading.
    """
    name = str(source)
    path = Path(source).expanduser()
    skipped: list[Path] = []
    read: Callable[[], Iterator[Document]]
    if name == "demo":
        read = partial(read_files, sorted(_SHIPPED_CORPUS.glob("*.txt.xz")), text_field)
    elif name.startswith("datasets:"):
        read = _dataset_reader(name.removeprefix("datasets:"), text_field)
    elif path.is_dir() and _is_saved_dataset(path):
        read = _dataset_reader(str(path), text_field)
    elif path.is_dir():
        files, skipped = text_files(path)
        read = partial(read_files, files, text_field)
    elif path.exists():
        if not looks_like_text(path):
            raise ValueError(not_text(path))
        read = partial(read_file, path, text_field, alone=True)
    elif _may_be_dataset_name(name) and not _nearest(path):
        read = _dataset_reader(name, text_field)
    else:
        raise ValueError(_missing(path))

    if next(read(), None) is None:
        left_out = f" besides {len(skipped)} files that are not text" if skipped else ""
        raise ValueError(f"The corpus {name!r} holds no text{left_out}; give a source with at least one document.")
    if skipped:
        warnings.warn(f"Skipped {len(skipped)} files of {name!r} that are not text, as {skipped[0]}.", stacklevel=2)
    return Corpus(name, read, tuple(skipped))


def split_of(document: Document, validation_share: float) -> Split:
    """The split in which a document belongs, by a hash of its text alone: equal documents share a split, and neither
    their order nor the rest of the corpus matters.

    Args:
        document: its text.
        validation_share: expected share of documents in validation, 0 <= share < 1.

    Raises:
        ValueError: the share is out of range.
    """
    require_share(validation_share)
    return "validation" if draw_of(document) < int(validation_share * 2**64) else "train"


def require_share(validation_share: float) -> None:
    """Raises ``ValueError`` for a share that is out of range."""
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}; give a share of at least 0 and below 1.")


def draw_of(document: Document) -> int:
    """A hash of the document's text, 0 to 2**64 - 1: the lowest are held out."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "little")


def _dataset_reader(name: str, text_field: str) -> Callable[[], Iterator[Document]]:
    dataset = _load_dataset(name)
    if text_field not in dataset.column_names:
        columns = ", ".join(map(repr, dataset.column_names))
        raise ValueError(f"The dataset {name!r} has no column {text_field!r} (it has {columns}); pass text_field=.")
    return partial(_dataset_documents, dataset.select_columns([text_field]), text_field)


def _dataset_documents(dataset: Any, text_field: str) -> Iterator[Document]:
    return (record[text_field] for record in dataset if record[text_field] and record[text_field].strip())


def _load_dataset(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"Reading {name!r} as a dataset needs the `datasets` package; run `pip install 'torch-engram[train]'`, "
            "or give an existing file or folder."
        ) from error
    if Path(name).is_dir() and _is_saved_dataset(Path(name)):
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, datasets.Dataset):
            return loaded
        if "train" not in loaded:
            raise ValueError(f"The dataset folder {name!r} has no split 'train'; save one under that name.")
        return loaded["train"]
    dataset, _, config = name.partition(":")
    try:
        return datasets.load_dataset(dataset, config or None, split="train")
    except Exception as error:  # the hub, the network and a dataset's own files fail in many types
        raise ValueError(
            f"{name!r} is neither an existing file or folder nor a dataset that could be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())}); check the name."
        ) from error


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _may_be_dataset_name(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and not name.endswith(_FILE_SUFFIXES)


def _missing(path: Path) -> str:
    nearest = _nearest(path)
    mend = f"did you mean {str(nearest)!r}?" if nearest else "check the path, or write 'datasets:NAME' for a dataset."
    return f"There is no file or folder {str(path)!r}; {mend}"


def _nearest(path: Path) -> Path | None:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    matches = difflib.get_close_matches(path.name, siblings, n=1)
    return path.parent / matches[0] if matches else None
