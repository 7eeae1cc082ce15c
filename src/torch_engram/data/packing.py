"""Tokenise a corpus once into token files (their layout: token_files.py), and find them again.

The folder's name stands for tokenizer, corpus and split. It is written under another name, synced and renamed, so a
folder of that name is always whole: a killed run leaves none, and of two processes at work on the same corpus at once
the first to finish wins and both use its files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from torch_engram.data.corpora import Corpus, Document, Split, draw_of, require_share
from torch_engram.data.token_files import META, TokenFiles, open_token_files
from torch_engram.data.tokenizers import end_token_id, tokenizer_digest
from torch_engram.durable import sync, write_json

_FORMAT = 1
_BATCH_CHARACTERS = 4 << 20
_STALE_SECONDS = 3600


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    validation_share: float = 0.01,
    end_token: str | None = None,
) -> TokenFiles:
    """Tokenise a corpus into `out_dir`, or open what an earlier run left there for the same text, tokenizer and share.

    Special tokens that happen to be written out in a document are encoded as the plain text that they are.
    Tokenising uses all cores; the environment variable RAYON_NUM_THREADS limits them.

    Args:
        corpus: read once for its digest, and once more where it is not in the cache.
        tokenizer: any; it is not changed.
        out_dir: cache folder; made if missing.
        validation_share: expected share of documents held out by `split_of`, 0 <= share < 1. Where that leaves a
            split empty, the document next in line goes there; a corpus of one document is all for training.
        end_token: name of the token that ends a document, where the tokenizer uses none of the usual ones.

    Raises:
        ValueError: the share is out of range, or the end token is unknown.
    """
    require_share(validation_share)
    end_id = end_token_id(tokenizer, end_token)
    digests = {"tokenizer": tokenizer_digest(tokenizer), "corpus": corpus.digest}
    identity = {"format": _FORMAT, **digests, "validation_share": validation_share, "end_id": end_id}
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = Path(out_dir) / f"tokens-{key}"
    if not folder.exists():
        _write_folder(folder, corpus, tokenizer, identity)
    return open_token_files(folder)


def _write_folder(folder: Path, corpus: Corpus, tokenizer: Tokenizer, identity: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        meta = _write_tokens(partial, corpus, tokenizer, identity, int(identity["validation_share"] * 2**64))
        write_json(partial / META, meta)
        for path in (*partial.iterdir(), partial):
            sync(path)
        try:
            partial.rename(folder)
            sync(folder.parent)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(partial)  # another process was first, with the same bytes
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_tokens(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, identity: dict[str, Any], held_out_below: int
) -> dict[str, Any]:
    """Stream the corpus into the files of `folder`, documents with a lower draw into validation; returns meta data."""
    end_id = identity["end_id"]
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    splits: list[Split] = ["train", "validation"] if held_out_below else ["train"]
    lowest, highest = 2**64, 0
    counts = {split: {"documents": 0, "tokens": 0, "text_bytes": 0} for split in splits}
    # A copy, for the caller's tokenizer may truncate, pad or read special tokens in text, and should go on doing so.
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True

    with ExitStack() as stack:
        files = {
            split: [stack.enter_context(open(folder / f"{split}{end}", "wb")) for end in (".bin", ".starts.bin")]
            for split in splits
        }
        for documents in _batches(corpus):
            for document, encoding in zip(
                documents, encoder.encode_batch_fast(documents, add_special_tokens=False), strict=True
            ):
                draw = draw_of(document)
                lowest, highest = min(lowest, draw), max(highest, draw)
                split: Split = "validation" if draw < held_out_below else "train"
                tokens, starts = files[split]
                starts.write(np.array(counts[split]["tokens"], "<i8").tobytes())
                tokens.write(np.array([*encoding.ids, end_id], dtype).tobytes())
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(encoding.ids) + 1
                counts[split]["text_bytes"] += len(document.encode())

    if all(count["documents"] for count in counts.values()):
        return {**identity, "dtype": dtype, "vocab_size": vocab_size, "splits": counts}
    if lowest == highest:
        warnings.warn(f"{corpus.name!r} is one document, so none of it is held out for validation.", stacklevel=2)
    nearest = lowest + 1 if not counts["validation"]["documents"] else highest
    return _write_tokens(folder, corpus, tokenizer, identity, 0 if lowest == highest else nearest)


def _batches(corpus: Corpus) -> Iterator[list[Document]]:
    """Documents in lists of some megabytes: enough to keep every core busy, little enough to hold in memory."""
    batch: list[Document] = []
    characters = 0
    for document in corpus:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _remove_stale(cache: Path) -> None:
    """Remove what killed runs left: partial folders in which nothing was written for an hour."""
    for partial in cache.glob("tokens-*.partial"):
        written = [path.stat().st_mtime for path in (partial, *partial.glob("*")) if path.exists()]
        if written and max(written) < time.time() - _STALE_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)
