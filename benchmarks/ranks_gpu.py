"""two-gpu-scaling, exchange-bytes, exposed-exchange: training tables that are divided over two GPUs.

    python benchmarks/ranks_gpu.py            # on two GPUs; without them two gloo processes, small, nothing recorded

The model and the step of host_table_gpu.py (115 M active parameters, 262,144 tokens a rank and step, bf16 rows with
row-wise state in host memory, fetched a step ahead), over 100 M rows. What takes turns on the same two ranks:

- ``alone``: the first rank by itself, with the whole table, while the other waits;
- ``divided``: both, the network by FSDP2, rows divided by their remainder: what `engram train --nproc 2` does;
- ``unsent``: the same trainer, with zeros in place of the rows and gradients that ranks send each other; ids cross.

Scaling is both ranks' tokens a second, divided, over one's alone. The exposed exchange is what a divided step takes
beyond one unsent, as a share; what FSDP2 sends is in both. Bytes are counted at every all-to-all of the memory: what
leaves a rank, against ids of 8 bytes, rows as they are stored and gradients in fp32, of the distinct rows that a rank
reads and does not hold, counted from the text.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from host_table_gpu import NAME, Sizes, Stand
from lookup_run import show
from record import record

from torch_engram.bench.steps import Runs
from torch_engram.bench.timing import median
from torch_engram.memory.exchange import Route
from torch_engram.train import loop
from torch_engram.train.build import Text, build_text
from torch_engram.train.loop import Trainer
from torch_engram.train.ranks import joined

SCALING, BYTES, EXPOSED = "two-gpu-scaling", "exchange-bytes", "exposed-exchange"
RANKS, ROWS, TURNS, STEPS = 2, 100_000_000, 4, 4
SMALL = Sizes(batch_size=2, seq_len=32, accumulation=2, hidden=64, vocab=512)


def main() -> None:
    on_gpus = torch.cuda.device_count() >= RANKS
    # Two trainers in one process leave each other's memory in pieces that neither can use.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder, port, on_gpus), RANKS)  # type: ignore[no-untyped-call]


def measure(rank: int, folder: str, port: int, on_gpus: bool) -> None:
    """What one rank does; the first one records."""
    faulthandler.dump_traceback_later(150, repeat=True)  # of ranks that wait for each other
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}}
    device = "cuda" if on_gpus else "cpu"
    with joined(device) as group:
        assert group is not None
        write = partial(record, device="cuda") if on_gpus else show
        stand = Stand(Sizes() if on_gpus else SMALL, device, Runs(folder, warm_up=3), write)
        runs = start(stand, group, ROWS if on_gpus else 20_000)
        faulthandler.cancel_dump_traceback_later()
        count_bytes(stand, runs["divided"], group)
        times(stand, runs, group)
        if on_gpus:
            retries = torch.cuda.memory_stats()["num_alloc_retries"]
            print(f"rank {rank}: {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB, {retries} retries", flush=True)
        for trainer in runs.values():
            for bank in trainer.banks.values():
                bank.flush()


# -- the trainers ------------------------------------------------------------------------------------------------------


def start(stand: Stand, group: dist.ProcessGroup, rows: int) -> dict[str, Trainer]:
    """The trainers of this rank, past their first steps."""
    recipe = replace(stand.recipe(rows, "host", 1), steps=1_000_000, out=f"{stand.runs.folder}/{group.rank()}")
    if group.rank():
        dist.barrier(group)  # the first rank writes the text's cache
    text = build_text(recipe)
    if not group.rank():
        dist.barrier(group)
    runs: dict[str, Trainer] = {}
    for name, make in {"alone": alone, "divided": divided}.items():
        begun = time.perf_counter()
        trainer = make(replace(recipe, name=name), text, group)
        if trainer is not None:
            runs[name] = trainer
            trainer.decoder.train()
            take(stand, trainer, stand.runs.warm_up)
        dist.barrier(group)
        if not group.rank():
            print(f"{name}: {time.perf_counter() - begun:.1f} s until its first steps are done", flush=True)
    return runs


def alone(recipe: loop.Recipe, text: Text, group: dist.ProcessGroup) -> Trainer | None:
    """One rank by itself."""
    return None if group.rank() else Trainer(recipe, text=text)


def divided(recipe: loop.Recipe, text: Text, group: dist.ProcessGroup) -> Trainer:
    """All ranks, tables and network divided."""
    return Trainer(recipe, text=text, group=group)


@contextmanager
def unsent() -> Iterator[None]:
    """Within, ranks send each other ids alone."""

    def answer(self: Route, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(self.order), values.shape[1])

    def give(self: Route, grads: torch.Tensor) -> torch.Tensor:
        return grads.new_zeros(len(self.asked), grads.shape[1])

    with patch.object(Route, "answer", answer), patch.object(Route, "give", give):
        yield


def take(stand: Stand, trainer: Trainer, steps: int) -> float:
    """Milliseconds of a step, from the end of a first one."""
    trainer.train_step()
    stand.wait()
    begun = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    stand.wait()
    took = 1e3 * (time.perf_counter() - begun) / steps
    for bank in trainer.banks.values():
        bank.settle()
        bank.flush()
    return took


# -- what is measured --------------------------------------------------------------------------------------------------


def times(stand: Stand, runs: dict[str, Trainer], group: dist.ProcessGroup) -> None:
    """Record steps, scaling and the exposed exchange."""
    taken: dict[str, list[float]] = {"alone": [], "divided": [], "unsent": []}
    for turn in range(TURNS):
        for name in taken if turn % 2 else reversed(taken):
            dist.barrier(group)
            trainer = runs.get("divided" if name == "unsent" else name)
            if trainer is not None:
                with unsent() if name == "unsent" else nullcontext():
                    taken[name].append(take(stand, trainer, STEPS))
    if group.rank():
        return
    for name, samples in taken.items():
        stand.write(SCALING, f"step-{name}", samples, "ms")
    scaling = [RANKS * one / both for one, both in zip(taken["alone"], taken["divided"], strict=True)]
    stand.write(SCALING, "two-over-one", scaling, "times", reference=1.0, ratio=median(scaling))
    exposed = [1 - own / both for own, both in zip(taken["unsent"], taken["divided"], strict=True)]
    stand.write(EXPOSED, "divided", exposed, "of the step", reference=1.0, ratio=median(exposed))


def count_bytes(stand: Stand, trainer: Trainer, group: dist.ProcessGroup) -> None:
    """Record what the memory sends to the other ranks in some steps, over what it has to."""
    bank, recipe = trainer.banks[NAME], trainer.recipe
    bank.settle()
    first = trainer._drawn  # the ids of the steps before it have crossed, their rows not
    with counted() as sent:
        take(stand, trainer, STEPS)
        bank.settle()
    # With rows fetched a step ahead, ids cross one step before their rows and gradients do.
    ids = sum(remote(trainer, step) for step in range(first, trainer._drawn))
    rows = sum(remote(trainer, step) for step in range(first - 1, trainer._drawn - 1))
    width = bank.config.per_order("row_dim")[0]
    stored = 2 if recipe.table.codec == "bf16" else 4
    least = ids * 8 + rows * width * (stored + 4)
    both = torch.tensor([float(sum(sent)), float(least)])
    dist.all_reduce(both, group=group)
    if not group.rank():
        payload, least = both.tolist()
        stand.write(BYTES, "sent", [payload / 1e6 / RANKS / (STEPS + 1)], "MB a rank and step")
        stand.write(BYTES, "sent-over-least", [payload / least], "times", reference=least, ratio=payload / least)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that leave this rank, one number for every all-to-all of the memory."""
    sent: list[int] = []
    real: Callable[..., object] = dist.all_to_all_single

    def count(output: torch.Tensor, given: torch.Tensor, *sizes: list[int], group: dist.ProcessGroup) -> object:
        parts = sizes[1] if len(sizes) > 1 else [len(given) // group.size()] * group.size()
        away = sum(parts) - parts[group.rank()]
        sent.append(away * given[:1].nbytes if len(given) else 0)
        return real(output, given, *sizes, group=group)

    with patch.object(dist, "all_to_all_single", count):
        yield sent


def remote(trainer: Trainer, step: int) -> int:
    """Distinct rows that this rank reads in a step and does not hold."""
    bank, recipe, ranks = trainer.banks[NAME], trainer.recipe, trainer.ranks
    micros = range(step * recipe.accumulation, (step + 1) * recipe.accumulation)
    batches = [trainer.data.batch(micro * ranks.size + ranks.rank) for micro in micros]
    found = 0
    for layer in bank.config.layers:
        reads = [
            bank.addressing.lookup(batch.tokens.to(bank.device), doc_start=batch.doc_start.to(bank.device))(layer)[1]
            for batch in batches
        ]
        distinct = torch.cat([read.flatten() for read in reads]).unique()
        found += int((distinct % ranks.size != ranks.rank).sum())
    return found


if __name__ == "__main__":
    main()
