"""disk-io: training from a table on disk, in blocks read and written, over what a plain benchmark of the disk reaches.

A decoder with 115 M active parameters (9 layers, hidden 1024) and Engrams at two layers (orders 2 and 3, 8 heads, rows
of 64 numbers in bf16 under row-wise Adam, 144 bytes each) trains on natural text, rows fetched a step ahead and written
back behind (`table.placement=disk`), with 4 GB of memory for blocks. A step has 16,384 tokens: one of host_table_gpu.py
has 16 times as many, and takes a disk of 50,000 blocks a second minutes. Every row of the table, 15 GB, was written
before: rows that never were are not read. What a step has the disk read and write is counted by /proc/self/io, so that
a block that is read twice for want of memory counts twice; beside it stands what the whole block device did
(/proc/diskstats), and how many distinct rows a second were fetched and written back.

The limit is a plain benchmark in the same run, in turns with the steps: random distinct blocks of 4 KiB of a file of
its own on the same disk, past the page cache, reads and writes in the proportion of the steps before, at the same time
and as many under way as the disk takes, nothing done with them. A turn of steps ends when all that it wrote is in the
file.

A disk that is slower than the step makes the step wait. So beside it stand the same step with a small table in memory,
and from the two which disk would keep up: the blocks of a step over the time of the step in memory.

    python benchmarks/disk_train.py FOLDER [--small]
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lookup_run import show
from record import record

from torch_engram.bench.timing import median
from torch_engram.config import EngramConfig
from torch_engram.models import DecoderConfig
from torch_engram.stores import WritableStore, make_keys
from torch_engram.stores.aio import AioTransfer
from torch_engram.stores.block_reads import BLOCK, aligned, open_direct
from torch_engram.train.loop import Trainer
from torch_engram.train.recipe import Recipe, TableRecipe

CLAIM = "disk-io"
LAYERS, ORDERS, HEADS, ROW_DIM = (1, 4), 2, 8, 64
FILLED = 1 << 16
Write = Callable[..., None]


@dataclass(frozen=True)
class Sizes:
    """What is measured; by default what the claim says."""

    rows: int = 104_000_000
    rows_in_memory: int = 10_000_000
    hidden: int = 1024
    layers: int = 9
    ffn_hidden: int = 2816
    vocab: int = 16_384
    length: int = 1024
    sequences: int = 16
    accumulation: int = 1
    warm_up: int = 2
    turns: int = 5
    steps: int = 1
    """Of a turn."""
    plain_bytes: int = 4 << 30
    plain_blocks: int = 1 << 17
    staging: str = "4GB"
    device: str = "cuda"
    data: str = "demo"


SMALL = Sizes(
    rows=400_000, rows_in_memory=100_000, hidden=64, layers=5, ffn_hidden=128, vocab=512, length=128, sequences=2,
    accumulation=2, turns=3, steps=2, plain_bytes=64 << 20, plain_blocks=4096, staging="16MB", device="cpu",
)  # fmt: skip
"""To see that it runs."""


def trainer_of(folder: Path, sizes: Sizes, placement: str) -> Trainer:
    """The model over a table on disk, or a smaller one in memory."""
    rows = sizes.rows if placement == "disk" else sizes.rows_in_memory
    engram = EngramConfig(
        layers=LAYERS, hidden=sizes.hidden, vocab_size=sizes.vocab, heads=HEADS, row_dim=ROW_DIM,
        rows_per_head=rows // (len(LAYERS) * ORDERS * HEADS),
    )  # fmt: skip
    model = DecoderConfig(
        vocab_size=sizes.vocab, hidden=sizes.hidden, layers=sizes.layers, heads=8, ffn_hidden=sizes.ffn_hidden,
        tie_embeddings=False, engrams={"engram": engram},
    )  # fmt: skip
    staging = sizes.staging if placement == "disk" else None
    table = TableRecipe(optimizer="rowwise_adam", codec="bf16", prefetch=1, placement=placement, staging=staging)
    on_gpu = sizes.device == "cuda"
    recipe = Recipe(
        f"on-{placement}", model, data=sizes.data, out=str(folder), seq_len=sizes.length, batch_size=sizes.sequences,
        accumulation=sizes.accumulation, steps=10_000, device=sizes.device, dtype="bf16" if on_gpu else "fp32",
        compile=on_gpu, table=table,
    )  # fmt: skip
    return Trainer(recipe)


def fill(trainer: Trainer) -> None:
    """Write every row once, all with the values of the first ones."""
    bank = trainer.banks["engram"]
    for table in bank.tables:
        source, keys = bank.source(table), make_keys(table.space, torch.arange(min(FILLED, table.rows)))
        planes = source.format.decode(keys, source.format.layout.empty(len(keys)))
        records = source.format.encode(keys, {**planes, "count": torch.ones_like(planes["count"])})
        assert isinstance(source.store, WritableStore)
        for rows in torch.arange(table.rows).split(FILLED):
            source.newest = source.store.write(make_keys(table.space, rows), records[: len(rows)])
    bank.flush()


@dataclass(frozen=True)
class Moved:
    """Blocks of 4 KiB, and the seconds that they took."""

    read: float
    written: float
    seconds: float
    by_device: float | None = None
    """Both, of everything that used the disk; None where the system does not say."""

    @property
    def rate(self) -> float:
        """Of both, a second."""
        return (self.read + self.written) / self.seconds

    @property
    def share_read(self) -> float:
        """Of both."""
        return self.read / (self.read + self.written)


def train(trainer: Trainer, steps: int, folder: Path) -> Moved:
    """What a disk did for so many steps, from rows that are fetched for the first to rows that are fetched for the one
    after the last, and all that was written in the file."""
    settle(trainer)
    before, device, start = _of_process(), _of_device(folder), time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    settle(trainer)
    seconds = time.perf_counter() - start
    after, device_after = _of_process(), _of_device(folder)
    by_device = None if device is None or device_after is None else device_after - device
    return Moved(after[0] - before[0], after[1] - before[1], seconds, by_device)


def settle(trainer: Trainer) -> None:
    """Return when all that was begun is done."""
    for bank in trainer.banks.values():
        bank.settle()
        bank.flush()
    if trainer.recipe.device == "cuda":
        torch.cuda.synchronize()


def _of_process() -> tuple[float, float]:
    """Blocks that this process has had disks read and write so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]) / BLOCK, int(lines["write_bytes"]) / BLOCK


def _of_device(folder: Path) -> float | None:
    """Blocks that were read from and written to the device of a folder so far."""
    device = os.stat(folder).st_dev
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        if (int(fields[0]), int(fields[1])) == (os.major(device), os.minor(device)):
            return (int(fields[5]) + int(fields[9])) * 512 / BLOCK
    return None


class PlainMix:
    """Random blocks of a file of ``size`` bytes, read and written past the page cache. Raises ``OSError`` where a file
    system or a system has no such reads."""

    def __init__(self, path: Path, size: int):
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        piece = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8).data
        for at in range(0, size, len(piece)):
            os.pwrite(self.descriptor, piece, at)
        os.fsync(self.descriptor)
        self._direct, self._blocks = open_direct(self, os.O_RDWR), size // BLOCK
        self._ways = AioTransfer(), AioTransfer(writes=True)
        self._random, self._threads = np.random.default_rng(1), ThreadPoolExecutor(2)

    def move(self, count: int, share_read: float) -> Moved:
        """So many blocks, none of them twice, the given share of them read and the others written."""
        count = min(count, self._blocks)
        at = self._random.choice(self._blocks, count, replace=False) * BLOCK
        reads = round(count * share_read)
        buffers = [aligned(max(1, len(part)) * BLOCK) for part in (at[:reads], at[reads:])]
        for buffer in buffers:
            buffer.fill(7)  # its pages are there before the clock runs
        start = time.perf_counter()
        for done in self._threads.map(self._some, self._ways, (at[:reads], at[reads:]), buffers):
            assert (done == BLOCK).all(), "a plain read or write failed"
        return Moved(reads, count - reads, time.perf_counter() - start)

    def _some(self, way: AioTransfer, at: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        return way(np.full(len(at), self._direct), at, np.full(len(at), BLOCK), buffer, np.arange(len(at)) * BLOCK)


def measure(folder: Path, sizes: Sizes, write: Write) -> None:
    """The step in memory, then turns of steps from disk and of the plain benchmark."""
    in_memory = trainer_of(folder, sizes, "device")
    train(in_memory, sizes.warm_up, folder)
    alone = [train(in_memory, sizes.steps, folder).seconds / sizes.steps for _ in range(sizes.turns)]
    del in_memory
    gc.collect()
    trainer = trainer_of(folder, sizes, "disk")
    begun = time.perf_counter()
    fill(trainer)
    print(f"a table of {trainer.banks['engram'].rows:,} rows: {time.perf_counter() - begun:.1f} s", flush=True)
    train(trainer, sizes.warm_up, folder)
    plain = PlainMix(folder / "plain", sizes.plain_bytes)
    steps: list[Moved] = []
    limits: list[Moved] = []
    for _ in range(sizes.turns):
        steps.append(train(trainer, sizes.steps, folder))
        limits.append(plain.move(sizes.plain_blocks, steps[-1].share_read))
        print(f"{steps[-1].rate:,.0f} blocks a second, plainly {limits[-1].rate:,.0f}", flush=True)
    report(steps, limits, alone, trainer._ahead[0].rows["engram"].touched, sizes, write)


def report(
    steps: list[Moved], limits: list[Moved], alone: list[float], touched: int, sizes: Sizes, write: Write
) -> None:
    """Write the ratios, turn by turn, and what they are made of."""
    plain = [limit.rate for limit in limits]
    ratios = [step.rate / rate for step, rate in zip(steps, plain, strict=True)]
    write(CLAIM, "train", ratios, "times", reference=1.0, ratio=median(ratios))
    write(CLAIM, "plain-mix", plain, "blocks/s")
    write(CLAIM, "blocks", [step.rate for step in steps], "blocks/s", reference=median(plain))
    by_device = [step.by_device / step.seconds for step in steps if step.by_device is not None]
    if by_device:
        write(CLAIM, "blocks-by-the-device", by_device, "blocks/s")
    write(CLAIM, "share-read", [step.share_read for step in steps], "of blocks")
    times = [step.seconds / sizes.steps for step in steps]
    write(CLAIM, "rows", [2 * touched / seconds for seconds in times], "rows/s")
    write(CLAIM, "distinct-rows", [float(touched)], "rows a step")
    write(CLAIM, "step-on-disk", [1e3 * seconds for seconds in times], "ms")
    write(CLAIM, "step-in-memory", [1e3 * seconds for seconds in alone], "ms")
    needed = [(step.read + step.written) / sizes.steps / median(alone) for step in steps]
    write(CLAIM, "disk-that-keeps-up", needed, "blocks/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="on the disk to measure; 20 GB in it come and go")
    parser.add_argument("--small", action="store_true", help="only see that it runs: small sizes, nothing recorded")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as beside:
        sizes, write = (SMALL, show) if arguments.small else (Sizes(), partial(record, device="cuda"))
        measure(Path(beside), sizes, write)


if __name__ == "__main__":
    main()
