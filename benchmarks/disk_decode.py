"""disk-decode-penalty: how much slower a whole model decodes with a memory's table on disk than with it in HBM.

    python benchmarks/disk_decode.py natural.txt.xz tokenizer.json FOLDER

A decoder in the shape of Qwen3's 4 B (`decode_penalty.py` says more of it) decodes 1, 4 and 16 sequences, which have
evenly from 100 to 1,024 tokens at first. The memory is `deepseek-v4.1`'s at block 2; its table of 24 GB, random rows in
FP8, is written to FOLDER and stays there for the run. It is read from the disk by direct reads, so that the page cache
is not used at all, behind a cache of 4 GB in HBM, and against that it lies in HBM as a whole. A step's rows are read
while its first blocks are computed. What is decoded is the second half of the text, fresh in every round. The cache is
filled with the first half; that the records for it come out of the table in HBM changes none, and saves minutes.

The sample of a round is one minus tokens a second with the disk over those with HBM.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from decoding.model import SHAPES, Shape
from decoding.replay import LAYER, PROMPT, Decoding, Remembered
from decoding.stand import Note, Text, below, build, engram_for, notes, take, tell
from torch import Tensor

from torch_engram.bench.lookup_tables import row_bytes, scaled, synthesise_layers
from torch_engram.bench.timing import copy_rate, median
from torch_engram.config import EngramConfig
from torch_engram.memory import DecodeMemory, MemoryBank
from torch_engram.stores import NgramCache, Store

CLAIM = "disk-decode-penalty"


def banks_of(folder: Path, gigabytes: float, text: Text, cache: str, device: torch.device) -> dict[str, MemoryBank]:
    """The table, written to ``folder``, in HBM and on disk."""
    config = replace(EngramConfig.preset("deepseek-v4.1"), layers=(LAYER,), vocab_size=text.vocab.size)
    rows = int(gigabytes * 1e9) // row_bytes("fp8", config.per_order("row_dim")[0])
    tables = synthesise_layers(folder, config, rows, None)
    config, layouts = scaled(config, tables)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def bank(placement: str, cache: str | None = None) -> MemoryBank:
        return MemoryBank(
            config, text.vocab, tables=tables, placement=placement, cache=cache, device=device, dtype=dtype,
            layouts=layouts,
        )  # fmt: skip

    return {"hbm": bank("device"), "disk": bank("disk-direct", cache)}


class Either:
    """One store and later another one, of the same rows."""

    grouped = False

    def __init__(self, chosen: Store):
        self.chosen, self.layout, self.spaces = chosen, chosen.layout, chosen.spaces

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        """See :class:`~torch_engram.stores.Store`."""
        return self.chosen.fetch(keys)


def warm(banks: Mapping[str, MemoryBank], text: Text, tokens: int) -> int:
    """Fill the cache in front of the disk with what the same table in HBM has."""
    front, above = (banks[name].source(banks[name].tables[0]).store for name in ("disk", "hbm"))
    assert isinstance(front, NgramCache) and front.layout == above.layout
    on_disk = front.store
    front.store = either = Either(above)
    warmed = text.warm(banks["disk"], tokens)
    front.store = either.chosen = on_disk
    return warmed


def measure(
    shape: Shape, sequences: int, banks: Mapping[str, MemoryBank], text: Text, asked: argparse.Namespace, note: Note
) -> None:
    """All rounds with so many sequences, then what is recorded of them."""
    device, disk, rate = banks["disk"].device, banks["disk"], copy_rate(banks["disk"].device)
    tokens = text.fresh(sequences, PROMPT + (asked.rounds + 1) * asked.steps + 1)
    batch = build(shape, sequences, asked.steps, tokens, device)
    module = engram_for(disk, shape.hidden)
    ways = {
        name: Decoding(batch, Remembered(bank, DecodeMemory(bank, sequences), module)) for name, bank in banks.items()
    }
    rates, found = take(ways, disk, asked.rounds, asked.steps)
    hbm, slower = rates["hbm"], rates["disk"]
    case = f"decode-{sequences}"
    note(case, below(slower, hbm), "share", reference=median(hbm), ratio=median(slower) / median(hbm))
    for name, samples in rates.items():
        note(f"{case}-{name}-speed", samples, "tokens/s")
    moved = batch.model.bytes_read + batch.cache.bytes_read(asked.steps)
    note(f"{case}-hbm-of-copy-rate", [moved * s / (1e3 * sequences) / rate for s in hbm], "share")
    if found is not None:
        note(f"{case}-hits", [found], "of n-grams")
    assert bool(batch.logits.isfinite().all()), "what was computed is not finite"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="of dev/build_natural_text.py, or demo")
    parser.add_argument("tokenizer", help="DeepSeek-V4's tokenizer.json")
    parser.add_argument("folder", type=Path, help="on the disk to measure; the table in it comes and goes")
    parser.add_argument("--gigabytes", type=float, default=24.0, help="of the table")
    parser.add_argument("--cache", default="4GB")
    parser.add_argument("--warm", type=int, default=13_000_000, help="tokens that fill the cache, at most")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="a toy model, nothing recorded; runs on a CPU")
    asked = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    note = notes(CLAIM, device, keep=not asked.tiny)
    text = Text(asked.text, asked.tokenizer)
    tell("text is there")
    asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.folder) as beside:
        banks = banks_of(Path(beside), asked.gigabytes, text, asked.cache, device)
        tell("tables are there")
        note("warmed", [float(warm(banks, text, asked.warm))], "tokens")
        note("table", [asked.gigabytes], "GB")
        for sequences in asked.sequences:
            measure(SHAPES["tiny" if asked.tiny else "4b"], sequences, banks, text, asked, note)


if __name__ == "__main__":
    main()
