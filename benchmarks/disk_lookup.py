"""disk-prefill-vs-limit: cold 8 k-token prefill from a table on disk, over the random reads that the disk gives.

Two tables of random rows as DeepSeek-V4.1 has them (FP8 codes and scales in tensors of their own), 32 M rows in all,
8.4 GB, are made in a folder on the disk that is to be measured. One sequence of the shipped corpus goes on in chunks of
8,192 tokens that are read once each. Cold: direct reads pass the page cache, and for reads through it the system is
told to drop the files' pages before every chunk; so the tables need not be larger than memory. ``read_bytes`` of
/proc/self/io says whether all came from the disk.

The limit is a plain benchmark in the same run, in turns with the chunks: as many random distinct blocks of 4 KiB as fit
its buffer, as many under way as the disk takes, nothing done with them. A chunk's rate is the distinct blocks that its
rows lie in (a block of codes and one of scales for most rows), over its time, from token ids on the host to embeddings.
Beside it stand the same with blocks that are neighbours counted as one read, distinct rows over the plain reads though
most rows take two, and tokens a second.

    python benchmarks/disk_lookup.py FOLDER
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from record import record
from torch import Tensor

from torch_engram.bench.excerpts import WARM_UP, Excerpts, Mode
from torch_engram.bench.limits import RandomReads
from torch_engram.bench.lookup_stand import LookupStand, config_for, read_text
from torch_engram.bench.lookup_tables import synthesise_layers
from torch_engram.bench.lookups import Read, drop_pages, require_right
from torch_engram.bench.timing import median
from torch_engram.memory import MemoryBank, Tokens
from torch_engram.stores import FileRows
from torch_engram.stores.block_reads import BLOCK

CLAIM, ROWS, CHUNK, CHUNKS, READS = "disk-prefill-vs-limit", 16_000_000, 8192, 8, 32_768
ASKED = CHUNK * 2 * 24
"""Rows that the tokens of a chunk want, at both layers."""
PLACEMENTS = ("disk-direct", "disk")


def blocks_of(bank: MemoryBank, files: dict[int, FileRows], windows: Tensor) -> tuple[int, int]:
    """Distinct blocks of 4 KiB that hold the rows of a chunk, and in how many runs of neighbours they lie."""
    blocks = runs = 0
    for layer, file in files.items():
        rows = np.unique(bank.addressing.rows(windows, layer)[1].numpy())
        for column, number, starts in zip(file.columns, *file.locate(rows), strict=True):
            ends = np.stack((starts, starts + column.nbytes - 1), 1) // BLOCK
            found = np.unique(number[:, None] << 40 | ends)
            blocks, runs = blocks + len(found), runs + 1 + int((np.diff(found) > 1).sum())
    return blocks, runs


def measure(stand: LookupStand, excerpts: Excerpts, mode: Mode) -> None:
    """The limit, then a chunk by every placement, turn by turn."""
    plain = RandomReads(list(stand.files.values()))
    banks = {placement: stand.bank(placement) for placement in PLACEMENTS}
    for bank in banks.values():
        require_right(bank, stand.files, excerpts.sample)
    histories = {placement: bank.new_history() for placement, bank in banks.items()}
    before = next(iter(banks.values())).new_history()
    limit: list[float] = []
    blocks: list[tuple[int, int]] = []
    reads: dict[str, list[Read]] = {placement: [] for placement in PLACEMENTS}
    for ids, doc_start in excerpts.reads(mode):
        limit.append(1e3 * READS / plain.blocks(READS))
        for placement, bank in banks.items():
            drop_pages(bank)
            reads[placement].append(Read.take(bank, Tokens(ids, doc_start=doc_start, history=histories[placement])))
        blocks.append(blocks_of(bank, stand.files, bank.addressing.windows(ids, history=before, doc_start=doc_start)))
    write(limit[WARM_UP:], blocks[WARM_UP:], {placement: taken[WARM_UP:] for placement, taken in reads.items()})


def write(limit: list[float], found: list[tuple[int, int]], reads: dict[str, list[Read]]) -> None:
    """Record the ratios, turn by turn, and what they are made of."""
    record(CLAIM, "plain-random-reads", limit, "reads/s")
    blocks, runs = zip(*found, strict=True)
    record(CLAIM, "distinct-blocks", [float(count) for count in blocks], "blocks")
    record(CLAIM, "runs-of-blocks", [float(count) for count in runs], "runs")
    for placement, taken in reads.items():
        seconds = [read.microseconds / 1e6 for read in taken]
        rates = [count / took for count, took in zip(blocks, seconds, strict=True)]
        ratios = [rate / plain for rate, plain in zip(rates, limit, strict=True)]
        record(CLAIM, placement, ratios, "times", reference=1.0, ratio=median(ratios))
        record(CLAIM, f"{placement}-blocks", rates, "blocks/s", reference=median(limit), ratio=median(ratios))
        by_runs = [count / took / plain for count, took, plain in zip(runs, seconds, limit, strict=True)]
        record(CLAIM, f"{placement}-runs", by_runs, "times", reference=1.0, ratio=median(by_runs))
        record(CLAIM, f"{placement}-tokens", [CHUNK / took for took in seconds], "tokens/s")
        rows = [ASKED * read.distinct / took / plain for read, took, plain in zip(taken, seconds, limit, strict=True)]
        record(CLAIM, f"{placement}-rows", rows, "times", reference=1.0, ratio=median(rows))
        record(CLAIM, f"{placement}-distinct-rows", [read.distinct for read in taken], "of rows")
        from_disk = [read.from_disk for read in taken if read.from_disk is not None]
        if from_disk:
            record(CLAIM, f"{placement}-from-disk", from_disk, "MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="on the disk to measure; 9 GB in it come and go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    text, mode = read_text("demo", None, Path("runs/cache")), Mode(1, CHUNK, CHUNKS)
    config = config_for("deepseek-v4.1", text, [])
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        tables = synthesise_layers(Path(beside), config, ROWS, None)
        stand = LookupStand(tables, config, text.vocab, torch.device("cpu"))
        measure(stand, Excerpts(text.files.train, [mode]), mode)


if __name__ == "__main__":
    main()
