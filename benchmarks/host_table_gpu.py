"""host-table-step, host-table-memory, step-flat-host: training a table in host memory that fits no GPU, on one GPU.

    python benchmarks/host_table_gpu.py

The model is lookup_gpu.py's (115 M active parameters, Engrams at two layers, orders 2 and 3, 8 heads, rows of 64
numbers in bf16 under row-wise Adam, so records of 144 bytes), at 262,144 tokens of natural text a step in 4
micro-batches, rows fetched a step ahead. Four trainers take turns in one process: a table of 10 M rows in HBM, and
tables of 10 M, 100 M and 625 M rows in host memory. The last has 40e9 numbers and 90 GB, or as much as memory leaves
room for; how many rows there were is recorded.

- Times are of whole steps, from the end of a turn's first step to the end of its last one: what a turn begins and ends
  with, an idle GPU, training does not have. Ratios are taken within a turn.
- Memory: the peak over some steps of the largest table, less the peak with constant embeddings of one micro-batch, plus
  those. It is held against 3 working sets, which are the distinct rows' records, and a step's embeddings.
- Beside it, each alone on an idle GPU: prefetching a step, fetching its rows, writing them back as the store does, and
  the steps of a write by the CPU: into new pinned memory, and from there into the table. The rows are of other steps
  each time.
- Resident: what the process has in memory of the table's pages, by the system's list of its mappings, after the steps;
  by how much its memory has grown, and the system's has shrunk, since before the table was made.

Other sizes are measured and printed, and not recorded, but for the numbers of turns and of steps alone; without a GPU,
neither are these.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from lookup_gpu import HEADS, LAYERS, ORDERS, recipe
from lookup_run import show
from record import record
from torch import Tensor

from torch_engram.bench.limits import bus_copy
from torch_engram.bench.steps import Run, Runs
from torch_engram.bench.timing import in_turns, median
from torch_engram.free_memory import free_memory
from torch_engram.memory import MemoryBank, Tokens, WorkingSet
from torch_engram.stores import HostStore
from torch_engram.train.loop import Trainer
from torch_engram.train.recipe import Recipe

STEP, MEMORY, FLAT = "host-table-step", "host-table-memory", "step-flat-host"
HBM, SMALL, MIDDLE, LARGEST = "10M-rows-in-HBM", "10M-rows", "100M-rows", "largest"
NAME = "engram"
LEFT_FREE = 10 * 10**9
"""Bytes of the host that no table takes."""
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """What is measured; by default what the claims say."""

    small: int = 10_000_000
    middle: int = 100_000_000
    largest: int = 625_000_000
    batch_size: int = 64
    seq_len: int = 1024
    accumulation: int = 4
    hidden: int = 1024
    vocab: int = 16_384
    prefetch: int = 1
    turns: int = 5
    steps: int = 5
    """Of a turn, beside the one that it begins with."""
    warm_up: int = 3
    alone: int = 5
    """Steps whose rows are fetched and written alone."""
    data: str = "demo"


@dataclass(frozen=True)
class Stand:
    """All that is measured, and where it is told. ``write``: as ``record()`` of record.py."""

    sizes: Sizes
    device: str
    runs: Runs
    write: Callable[..., None]

    def recipe(self, rows: int, placement: str, prefetch: int) -> Recipe:
        """The model over about ``rows`` rows."""
        sizes, base = self.sizes, recipe(self.runs.folder, rows, prefetch)
        engram = replace(base.model.engrams[NAME], hidden=sizes.hidden, vocab_size=sizes.vocab)
        model = replace(
            base.model, vocab_size=sizes.vocab, hidden=sizes.hidden, ffn_hidden=sizes.hidden * 11 // 4,
            engrams={NAME: engram},
        )  # fmt: skip
        on_gpu = self.device == "cuda"
        return replace(
            base, name=f"{placement}-{rows}-{prefetch}", model=model, data=sizes.data, seq_len=sizes.seq_len,
            batch_size=sizes.batch_size, accumulation=sizes.accumulation, device=self.device, compile=on_gpu,
            dtype="bf16" if on_gpu else "fp32", table=replace(base.table, placement=placement),
        )  # fmt: skip

    def wait(self) -> None:
        """For the whole device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], object]) -> float:
        """By the clock, from an idle device to an idle device."""
        self.wait()
        begun = time.perf_counter()
        work()
        self.wait()
        return 1e3 * (time.perf_counter() - begun)


# -- steps ------------------------------------------------------------------------------------------------------------


def mark(stand: Stand) -> torch.cuda.Event | float:
    """Now, on a GPU when it has come so far."""
    if stand.device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def step_milliseconds(stand: Stand, run: Run) -> float:
    """The mean of a turn's steps, whole ones, from the end of the first."""
    marks = []
    for _ in range(stand.sizes.steps + 1):
        run.step()
        marks.append(mark(stand))
    stand.wait()
    bank_of(run).settle()
    bank_of(run).flush()  # what the host still writes is not to be in the next one's turn
    first, last = marks[0], marks[-1]
    took = 1e3 * (last - first) if isinstance(last, float) else first.elapsed_time(last)
    return took / stand.sizes.steps


def times(stand: Stand, runs: dict[str, Run]) -> None:
    """Record every table's step, and the ratios."""
    taken = in_turns({name: partial(step_milliseconds, stand, run) for name, run in runs.items()}, stand.sizes.turns)
    reference = {STEP: HBM, FLAT: SMALL}
    cases = ((STEP, HBM), (STEP, LARGEST), (FLAT, SMALL), (FLAT, MIDDLE), (FLAT, LARGEST))
    for claim, name in cases:
        against = median(taken[reference[claim]])
        ratio = median(taken[name]) / against
        stand.write(claim, f"step-{name}", taken[name], "ms", reference=against, ratio=ratio)
    for claim, name in cases:
        if name != reference[claim]:
            ratios = [a / b for a, b in zip(taken[name], taken[reference[claim]], strict=True)]
            stand.write(claim, f"{name}-over-{reference[claim]}", ratios, "times", reference=1.0, ratio=median(ratios))


# -- memory of the GPU ------------------------------------------------------------------------------------------------


def peak(stand: Stand, run: Run, before: int) -> int:
    """The most bytes of the GPU during some steps, beyond what was held before the run was made."""
    if stand.device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    run.take(stand.sizes.steps)
    return torch.cuda.max_memory_allocated() - before


def held(stand: Stand) -> int:
    """Bytes of the GPU that are held now."""
    gc.collect()
    return torch.cuda.memory_allocated() if stand.device == "cuda" else 0


def peak_without(stand: Stand) -> int:
    """The peak of a run with constant embeddings, without those."""
    before = held(stand)
    run = stand.runs.start(stand.recipe(stand.sizes.small, "host", 0), with_lookups=False)
    bank = bank_of(run)
    for table in bank.tables:  # its first step was one with lookups, whose writes are kept until the next
        bank.source(table)._writes.clear()
    constants = sum(leaf.nbytes for leaf in embeddings(stand, 1, bank))
    return peak(stand, run, before) - constants


def embeddings(stand: Stand, micro_batches: int, bank: MemoryBank) -> Iterator[Tensor]:
    """Tensors as large as so many micro-batches' embeddings, without their memory."""
    shape = (stand.sizes.batch_size, stand.sizes.seq_len, bank.config.embedding_dim)
    return (torch.empty(shape, dtype=bank.dtype, device="meta") for _ in range(micro_batches * len(bank.config.layers)))


def gpu_memory(stand: Stand, run: Run, used: int, without: int) -> None:
    """Record what the memory takes of the GPU over what it may. ``used``, ``without``: peaks with it and without."""
    bank, rows = bank_of(run), touched(run, 0)
    width = bank.config.per_order("row_dim")[0]
    working_set = rows * store_of(bank).layout.nbytes
    expanded = sum(leaf.nbytes for leaf in embeddings(stand, stand.sizes.accumulation, bank))
    allowed, own = 3 * working_set + expanded, used - without
    stand.write(STEP, "distinct-rows", [float(rows)], "rows")
    stand.write(STEP, "working-set", [working_set / GIB], "GiB")
    stand.write(STEP, "working-set-decoded", [rows * (4 * width + 8) / GIB], "GiB")
    stand.write(MEMORY, "allowed", [allowed / GIB], "GiB")
    stand.write(MEMORY, "embeddings", [expanded / GIB], "GiB")
    stand.write(MEMORY, "taken", [own / GIB], "GiB")
    stand.write(MEMORY, "taken-over-allowed", [own / allowed], "times", reference=1.0, ratio=own / allowed)


# -- what the prefetch and the write-back take alone ------------------------------------------------------------------


def bank_of(run: Run) -> MemoryBank:
    """A run's only one."""
    return run.trainer.banks[NAME]


def store_of(bank: MemoryBank) -> HostStore:
    """The store of all tables."""
    store = bank.source(bank.tables[0]).store
    assert isinstance(store, HostStore)
    return store


def prefetched(trainer: Trainer, number: int) -> WorkingSet:
    """The rows of a step that nobody trains."""
    recipe = trainer.recipe
    first = (1_000 + number) * recipe.accumulation
    batches = [trainer.data.batch(first + micro) for micro in range(recipe.accumulation)]
    if recipe.device == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    return trainer.banks[NAME].prefetch(*(Tokens(batch.tokens, doc_start=batch.doc_start) for batch in batches))


def touched(run: Run, number: int) -> int:
    """U of a step."""
    rows = prefetched(run.trainer, number)
    found = rows.touched
    rows.discard()
    return found


def keys_of(run: Run, number: int) -> list[Tensor]:
    """The distinct keys of a step, one tensor a table."""
    rows = prefetched(run.trainer, number)
    found = [table.keys.clone() for table in rows._all_rows()]
    rows.discard()
    return found


def alone(stand: Stand, run: Run) -> None:
    """Record the parts, for one step's rows of all tables, and the rate of the bus."""
    store, took = store_of(bank_of(run)), dict[str, list[float]]()

    def whole(number: int) -> None:
        rows = prefetched(run.trainer, number)
        assert rows.touched
        rows.discard()

    store.flush()
    for number in range(1, 1 + stand.sizes.alone):
        timed = partial(stand.milliseconds, partial(whole, number))
        took.setdefault("prefetch-alone", []).append(timed())
        for name, spent in parts(stand, store, keys_of(run, number + stand.sizes.alone)):
            took.setdefault(name, []).append(spent)
    moved = median([float(touched(run, number)) for number in range(1, 3)]) * store.layout.nbytes
    for name, samples in took.items():
        stand.write(STEP, name, samples, "ms")
    for name in ("fetch-alone", "write-alone"):
        stand.write(STEP, f"{name}-rate", [moved / spent / 1e6 for spent in took[name]], "GB/s")
    bus = list(bus_copy(torch.device("cuda")).samples) if stand.device == "cuda" else [1.0]
    stand.write(STEP, "bus-copy", bus, "GB/s")


def parts(stand: Stand, store: HostStore, keys: Sequence[Tensor]) -> Iterator[tuple[str, float]]:
    """Milliseconds by name. No row changes: what is written is what was read."""
    records: list[Tensor] = []
    yield "fetch-alone", stand.milliseconds(lambda: records.extend(store.fetch(wanted) for wanted in keys))

    def write() -> None:
        for wanted, rows in zip(keys, records, strict=True):
            store.write(wanted, rows)
        store.flush()

    yield "write-alone", stand.milliseconds(write)
    pin, staged = stand.device == "cuda", list[Tensor]()

    def stage() -> None:
        for tensor in (*keys, *records):
            staged.append(torch.empty_like(tensor, device="cpu", pin_memory=pin).copy_(tensor, non_blocking=True))

    yield "stage-alone", stand.milliseconds(stage)

    def scatter() -> None:
        for wanted, rows in zip(staged[: len(keys)], staged[len(keys) :], strict=True):
            store.table.scatter(wanted, rows)

    yield "cpu-scatter-alone", stand.milliseconds(scatter)


# -- memory of the host -----------------------------------------------------------------------------------------------


def largest_rows(sizes: Sizes) -> int:
    """As many rows as the claims want, or as there is room for beside the smaller tables."""
    record_bytes = 144 + 1  # with its mark
    room = free_memory()
    if room is None:
        return sizes.largest
    return min(sizes.largest, (room - LEFT_FREE) // record_bytes - sizes.small * 2 - sizes.middle)


def process_bytes() -> int:
    """What this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def mapped_bytes(first: int, size: int) -> int:
    """What this process has in memory of the mappings that ``size`` bytes from the address ``first`` lie in."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin < first + size and end > first
        elif inside and name == "Rss:":
            found += 1024 * int(rest[0])
    return found


def host_memory(stand: Stand, run: Run, grown: int, shrunk: int) -> None:
    """Record how large the table is and how much of it is there."""
    bank = bank_of(run)
    table = store_of(bank).table
    size = table.records.nbytes
    mapped = mapped_bytes(table.records.data_ptr(), size)
    stand.write(STEP, "rows", [bank.rows / 1e6], "M")
    stand.write(STEP, "numbers-in-rows", [bank.table_parameters / 1e9], "1e9")
    stand.write(STEP, "active-parameters", [run.trainer.account.active / 1e6], "M")
    stand.write(STEP, "table", [size / 1e9], "GB")
    for name, there in (("mapped", mapped), ("grown", grown), ("shrunk", shrunk)):
        stand.write(STEP, f"resident-{name}", [there / 1e9], "GB", reference=size / 1e9, ratio=there / size)


# -- all of it --------------------------------------------------------------------------------------------------------


def start(stand: Stand, largest: int) -> dict[str, Run]:
    """All runs past their first steps; records memory on the way."""
    sizes = stand.sizes
    runs = {HBM: stand.runs.start(stand.recipe(sizes.small, "device", sizes.prefetch))}
    without = peak_without(stand)  # not first: what the first run makes stays for all
    for name, rows in ((SMALL, sizes.small), (MIDDLE, sizes.middle)):
        runs[name] = stand.runs.start(stand.recipe(rows, "host", sizes.prefetch))
    before, process, system = held(stand), process_bytes(), free_memory() or 0
    begun = time.perf_counter()
    runs[LARGEST] = run = stand.runs.start(stand.recipe(largest, "host", sizes.prefetch))
    print(f"a table of {bank_of(run).rows:,} rows and its first steps: {time.perf_counter() - begun:.1f} s", flush=True)
    used = peak(stand, run, before)
    host_memory(stand, run, process_bytes() - process, system - (free_memory() or 0))
    gpu_memory(stand, run, used, without)
    return runs


def measure(sizes: Sizes, device: str) -> None:
    """All claims."""
    recorded = device == "cuda" and replace(sizes, turns=Sizes.turns, alone=Sizes.alone) == Sizes()
    begun = time.perf_counter()
    largest = largest_rows(sizes)
    if largest < len(LAYERS) * ORDERS * HEADS:
        raise ValueError("The host has no room for the largest table: measure on one with more memory.")
    with tempfile.TemporaryDirectory() as folder:
        stand = Stand(
            sizes, device, Runs(folder, warm_up=sizes.warm_up), partial(record, device="cuda") if recorded else show
        )
        runs = start(stand, largest)
        print(f"ready to be timed: {time.perf_counter() - begun:.1f} s", flush=True)
        times(stand, runs)
        alone(stand, runs[LARGEST])
        for run in runs.values():
            bank_of(run).flush()
    print(f"all of it: {time.perf_counter() - begun:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    sizes = Sizes(**vars(parser.parse_args()))
    measure(sizes, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
