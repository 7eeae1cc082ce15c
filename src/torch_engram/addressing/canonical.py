"""The canonical vocabulary: token ids that read the same to a person share one id.

``" The"``, ``"the"`` and ``"THE"`` become one canonical id, which shrinks the space of n-grams (arXiv 2601.07372;
128,815 ids of DeepSeek-V3 become 98,627). A map is built once for each tokenizer and cached by its digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tokenizers import Regex, normalizers
from torch import Tensor

from torch_engram.data.tokenizers import load_tokenizer, tokenizer_digest
from torch_engram.durable import replacing

_SPACE_ONLY = "\ue000"  # a private-use character that holds a lone space's place while Strip runs


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), _SPACE_ONLY),
        normalizers.Strip(),
        normalizers.Replace(_SPACE_ONLY, " "),
    ])  # fmt: skip


class CanonicalVocab:
    """A surjection from raw token ids to canonical ids.

    ``ids`` is int64 ``[V]`` on the CPU: the canonical id of every raw id. ``tokenizer_digest`` names the tokenizer
    that it was made for, so that a checkpoint can refuse another. Raises ``ValueError`` for another shape or type.
    """

    def __init__(self, ids: Tensor, tokenizer_digest: str):
        if ids.dtype != torch.int64 or ids.ndim != 1 or not len(ids):
            raise ValueError(f"Canonical ids are {ids.dtype} {list(ids.shape)}: give int64 [V], one for each raw id.")
        self.ids = ids
        self.tokenizer_digest = tokenizer_digest
        self.size = int(ids.max()) + 1

    @property
    def raw_size(self) -> int:
        """V: number of raw ids."""
        return self.ids.numel()

    @property
    def digest(self) -> str:
        """sha256 of the map as int64 little-endian."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    @classmethod
    def build(cls, tokenizer: Any) -> CanonicalVocab:
        """The map of a ``tokenizers`` or fast ``transformers`` tokenizer, or of a ``tokenizer.json``."""
        backend = load_tokenizer(tokenizer)
        norm = _normalizer().normalize_str
        canonical: dict[str, int] = {}
        ids = []
        for raw in range(max(backend.get_vocab().values()) + 1):  # ids may have holes
            text = backend.decode([raw], skip_special_tokens=False)
            key = (backend.id_to_token(raw) or text) if "\ufffd" in text else (norm(text) or text)
            ids.append(canonical.setdefault(key, len(canonical)))
        return cls(torch.tensor(ids, dtype=torch.int64), tokenizer_digest(backend))

    @classmethod
    def of(cls, tokenizer: Any, cache: Path | None = None) -> CanonicalVocab:
        """:meth:`build`, remembered by the tokenizer's digest under ``cache`` (default: the user's cache folder)."""
        digest = tokenizer_digest(load_tokenizer(tokenizer))
        folder = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch-engram" / "canonical"
        path = folder / f"{digest}.safetensors"
        try:
            vocab = cls.load(path)
            if vocab.tokenizer_digest == digest:
                return vocab
        except (ValueError, OSError):  # absent or damaged: building is always right
            pass
        vocab = cls.build(tokenizer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            vocab.save(path)
        except OSError:  # a read-only or full home only costs the next start its second
            pass
        return vocab

    def save(self, path: Path) -> None:
        """Write the map and the tokenizer's digest to one safetensors file, atomically."""
        digests = json.dumps([self.digest, self.tokenizer_digest])  # one entry: several come in no fixed order
        with replacing(path) as file:
            file.write(save({"canonical_ids": self.ids}, metadata={"digests": digests}))

    @classmethod
    def load(cls, path: Path) -> CanonicalVocab:
        """Inverse of :meth:`save`. Raises ``ValueError`` for a damaged file, ``OSError`` for an absent one."""
        try:
            with safe_open(path, framework="pt") as file:
                digest, tokenizer_digest = json.loads(file.metadata()["digests"])
                vocab = cls(file.get_tensor("canonical_ids"), tokenizer_digest)
            if vocab.digest != digest:
                raise ValueError("its checksum differs")
            return vocab
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged or no canonical vocabulary: use an intact copy.") from error
