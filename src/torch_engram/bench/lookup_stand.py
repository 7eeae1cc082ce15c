"""Where lookups are timed: tables, a preset scaled to them, text, and the limits of this machine, measured first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from torch_engram.addressing import CanonicalVocab
from torch_engram.bench.excerpts import Excerpts, Mode
from torch_engram.bench.limits import limit_of, limits
from torch_engram.bench.lookup_tables import row_bytes, scaled
from torch_engram.bench.lookups import LookupTimes, require_right, time_lookups, warm_cache
from torch_engram.config import EngramConfig, nearest
from torch_engram.data.tokenizers import end_token_id
from torch_engram.memory import MemoryBank
from torch_engram.memory.file_tables import IN_PLACE, LOADED
from torch_engram.stores import FileRows
from torch_engram.stores.named_tables import NamedTable
from torch_engram.train import get_recipe
from torch_engram.train.build import Text, build_text

_WHAT = (
    "From token ids on the host until the embeddings of all layers are there, nothing overlapped, text that this bank "
    "has not read before. GB/s count the rows of every token, though one that several want is read once; distinct is "
    "the share that is left then."
)
_LIMITS = (
    "The limit is disk-rows for disk-direct, and for disk where pages are dropped; bus-copy for host with a GPU; a "
    "gather in memory for the rest. A lookup may exceed it, for it reads a row once that many tokens "
    "want, and none that a cache has."
)
_DROPPED = "Before every read the system was told to drop the files' pages: what is read in place comes from the disk."
_AS_FOUND = "The page cache was left as it was: MB from disk are what it did not have (--cold has it dropped first)."

_CACHED = (
    "A cache stands in front of every placement but device, filled by {warmed:,} tokens of the text before those that "
    "are timed, and by what was timed before. Hits are n-grams that it had when a read began, one that several tokens "
    "want counted as often."
)


def choose_placements(names: Sequence[str], device: str) -> list[str]:
    """These placements, or all that differ on ``device``. Raises ``ValueError`` with the nearest name for one that is
    none."""
    known = [*IN_PLACE, *LOADED]
    for name in names:
        if name not in known:
            raise ValueError(f"There is no placement {name!r}: {nearest(name, known)}")
    return list(dict.fromkeys(names)) or (known if device == "cuda" else [*IN_PLACE, "host"])


def read_text(text: str, tokenizer: str | None, cache: Path) -> Text:
    """A text's tokens, as ``engram train`` reads them. Raises ``ValueError`` naming what is wrong with it."""
    recipe = replace(get_recipe("small-engram"), data=text, tokenizer=tokenizer, cache=str(cache), seq_len=1)
    return build_text(recipe)


def config_for(preset: str, text: Text, layers: Sequence[int]) -> EngramConfig:
    """A preset for this text's vocabulary, at ``layers`` or its own."""
    config = EngramConfig.preset(preset)
    size = text.vocab.size if config.scheme == "engram" else text.vocab.raw_size
    pad = config.pad_id if config.pad_id < size else end_token_id(text.tokenizer)
    chosen = tuple(sorted(set(layers))) or config.layers
    return replace(config, vocab_size=size, pad_id=pad, layers=chosen)


class LookupStand:
    """``tables``: by layer. ``config``: is scaled to them. ``cold``: pages of the files are dropped before every read.
    ``cache``: bytes of a cache in front of every placement but ``device``.

    Raises ``ValueError`` for tables that do not fit, ``OSError`` for files that cannot be read.
    """

    def __init__(
        self,
        tables: Mapping[int, NamedTable],
        config: EngramConfig,
        vocab: CanonicalVocab,
        device: torch.device,
        cold: bool = False,
        cache: int | None = None,
    ):
        self.tables, self.device, self.cold, self._vocab = dict(tables), device, cold, vocab
        self.cache = cache
        self.config, self._layouts = scaled(config, tables)
        self.files = {layer: FileRows.of(table) for layer, table in tables.items()}
        self.limits = {one.case: one for one in limits(list(self.files.values()), device)}
        """By name; those that this machine has."""

    def bank(self, placement: str) -> MemoryBank:
        """A bank that reads the tables so. Raises ``ValueError`` when they or the cache do not fit into memory."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return MemoryBank(
            self.config, self._vocab, tables=self.tables, placement=placement, device=self.device, dtype=dtype,
            layouts=self._layouts, cache=None if placement == "device" else self.cache,
        )  # fmt: skip

    def time(self, placement: str, modes: Sequence[Mode], excerpts: Excerpts) -> list[LookupTimes]:
        """Check a placement, fill its cache, then time it. Raises ``ValueError`` for one that is wrong or does not fit
        into memory."""
        bank = self.bank(placement)
        limit = self.limits.get(limit_of(placement, self.device, self.cold))
        require_right(bank, self.files, excerpts.sample)
        if bank.grouped:  # it has a cache
            warm_cache(bank, excerpts)
        return [time_lookups(bank, placement, mode, excerpts, limit, self.cold) for mode in modes]

    def describe(self, warmed: int = 0) -> str:
        """One line for a table; ``warmed``: tokens that filled caches."""
        first = next(iter(self.tables.values()))
        layers = ",".join(map(str, self.tables))
        rows = ",".join(f"{table.rows}" for table in self.tables.values())
        cache = "" if self.cache is None else f" cache={self.cache} warmed={warmed}"
        return (
            f"layers={layers} rows={rows} columns={self.config.columns} codec={first.codec} "
            f"row-bytes={row_bytes(first.codec, first.width)} pages={'dropped' if self.cold else 'as-found'}{cache}"
        )

    def notes(self, warmed: int = 0) -> list[str]:
        """How the figures are to be read."""
        cached = [] if self.cache is None else [_CACHED.format(warmed=warmed)]
        return [_WHAT, _DROPPED if self.cold else _AS_FOUND, _LIMITS, *cached]
