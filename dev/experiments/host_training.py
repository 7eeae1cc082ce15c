"""How rows of a training step should cross the bus, so that the network beside them is slowed least, on one GPU.

    python dev/experiments/host_training.py     # without a CUDA device: a tiny size, by the CPU's ways

What fetches and writes rows of the host occupies processors of the GPU. How many, and for how long, is a choice: many
programs of few threads, few of many, or none, where the CPU gathers and scatters and the copy engines move. One trainer
with 100 M rows in host memory takes its turns with each choice and, last in every turn, with the table in HBM. The step
times are those of benchmarks/host_table_gpu.py.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from host_table_gpu import HBM, Sizes, Stand, bank_of, keys_of, step_milliseconds, store_of

from torch_engram.bench.steps import Run, Runs
from torch_engram.bench.timing import in_turns, median
from torch_engram.stores import ask_kernels, table_kernels
from torch_engram.stores.host_reads import ALL

GPU = torch.cuda.is_available()
AS_IT_IS = table_kernels.scatter_triton
SIZES = Sizes(turns=4) if GPU else Sizes(
    small=5_000, middle=20_000, largest=20_000, batch_size=2, seq_len=32, accumulation=2, hidden=64, vocab=512,
    turns=2, steps=2, warm_up=1,
)  # fmt: skip
READS = {"256x4": (256, 4, 4), "64x16": (64, 16, 4), "32x16": (32, 16, 4)}
WRITES = {"32x1024": (32, 1024, 4), "16x4096": (16, 4096, 16), "8x4096": (8, 4096, 16)}
"""Programs, rows or words that each moves together, warps."""
CHOICES = [
    ("256x4", "32x1024"), ("64x16", "16x4096"), ("32x16", "8x4096"), ("32x16", "32x1024"),
    ("256x4", "staged"), ("32x16", "staged"), ("staged", "32x1024"), ("staged", "staged"),
]  # fmt: skip


def choose(run: Run, read: str, write: str) -> None:
    """Let the run's rows cross so from here on."""
    store = store_of(bank_of(run))
    store.flush()
    for reads in store._reads.values():
        reads._division = (0, 0) if read == "staged" else ALL
        if not hasattr(reads, "all_marks"):
            reads.all_marks = reads.marks
        reads.marks = None if write == "staged" else reads.all_marks
    if read != "staged":
        ask_kernels.read_triton = partial(read_rows, READS[read])
    if write != "staged":
        table_kernels.scatter_triton = partial(write_rows, WRITES[write])


def read_rows(how: tuple[int, int, int], words, keys, count, bases, rows, head, first, share, out) -> None:
    programs, many, warps = how
    width = words.shape[1]
    ask_kernels._read[(programs,)](
        words, keys, count, bases, rows, head, out.view(torch.int64), first, share, programs,
        SPACES=len(rows), WIDTH=width, TILE=1 << (width - 1).bit_length(), ROWS=many, num_warps=warps,
    )  # fmt: skip


def write_rows(how: tuple[int, int, int], table, bases, keys, records, changed, programs=None) -> None:
    if programs is None:  # a table in HBM
        return AS_IT_IS(table, bases, keys, records, changed)
    programs, words, warps = how
    table_kernels._scatter[(programs,)](
        table, bases, keys, records, changed, records.numel(), programs, WIDTH=table.shape[1], WORDS=words,
        num_warps=warps,
    )  # fmt: skip


def alone(stand: Stand, run: Run) -> tuple[float, float]:
    """Milliseconds of a fetch and of a write of a step's rows on an idle GPU."""
    store, records = store_of(bank_of(run)), []
    keys = keys_of(run, 3)
    took = []
    for _ in range(3):
        records.clear()
        fetch = stand.milliseconds(lambda: records.extend(store.fetch(wanted) for wanted in keys))

        def write() -> None:
            for wanted, rows in zip(keys, records, strict=True):
                store.write(wanted, rows)
            store.flush()

        took.append((fetch, stand.milliseconds(write)))
    return took[-1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        stand = Stand(SIZES, "cuda" if GPU else "cpu", Runs(folder, warm_up=SIZES.warm_up), print)
        in_hbm = stand.runs.start(stand.recipe(SIZES.small, "device", SIZES.prefetch))
        run = stand.runs.start(stand.recipe(SIZES.middle, "host", SIZES.prefetch))
        works = []
        for read, write in CHOICES:
            choose(run, read, write)
            try:
                alone(stand, run)
            except RuntimeError as error:  # a compiler that does not manage this shape
                print("does not compile:", read, write, str(error)[:80], flush=True)
                continue
            works.append((read, write))
            print("alone", read, write, "fetch {:.1f} ms, write {:.1f} ms".format(*alone(stand, run)), flush=True)

        def turn(read: str, write: str) -> float:
            choose(run, read, write)
            return step_milliseconds(stand, run)

        ways: dict[str, Callable[[], float]] = {
            f"{read} / {write}": partial(turn, read, write) for read, write in works
        }
        taken = in_turns({**ways, HBM: partial(step_milliseconds, stand, in_hbm)}, SIZES.turns)
        for name, samples in taken.items():
            ratio = median([a / b for a, b in zip(samples, taken[HBM], strict=True)])
            print(
                f"{name}: {median(samples):.1f} ms a step, {ratio:.4f} of HBM's;",
                [round(s, 1) for s in samples],
                flush=True,
            )


if __name__ == "__main__":
    main()
