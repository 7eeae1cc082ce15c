"""lookup-share, lookup-exposed, step-flat-rows: what a memory in HBM costs a training step on one GPU.

A dense decoder with 115 M active parameters (9 layers, hidden 1024) and Engrams at two layers (orders 2 and 3, 8 heads,
rows of 64 numbers in bf16 under row-wise Adam), 65,536 tokens of natural text a step in sequences of 1,024, compiled.

- share: the time of a GPU for addressing, unique, fetch, expansion, merge and row update of a step, summed over their
  kernels and copies on an otherwise idle GPU, over the whole step with nothing fetched ahead. Beside it the same work
  by the clock, from ids on the host to rows written back: on an idle GPU that is mostly the time of launches.
- exposed: what a step with rows fetched a step ahead takes beyond the same step with constant embeddings, over the
  step. The variants take turns in the same process, and a difference is taken within each turn.
- flat: a step with 300 M rows over one with 10 M, on the same batches; and the peak of memory beyond weights' and
  tables' own.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from record import record
from torch.profiler import ProfilerActivity, profile

from torch_engram.bench.steps import without_lookups
from torch_engram.bench.timing import in_turns, median, wall_milliseconds
from torch_engram.config import EngramConfig
from torch_engram.memory import Tokens
from torch_engram.models import DecoderConfig
from torch_engram.train.build import Text
from torch_engram.train.loop import Trainer
from torch_engram.train.recipe import Recipe, TableRecipe

LAYERS, ORDERS, HEADS, ROW_DIM, HIDDEN, VOCAB = (1, 4), 2, 8, 64, 1024, 16_384
TURNS, STEPS = 16, 10
"""A turn begins and ends with an idle GPU, which training does not: many steps keep that small."""
GIB = 2**30


def recipe(folder: str, rows: int, prefetch: int) -> Recipe:
    """The model of all three claims over about ``rows`` rows."""
    engram = EngramConfig(
        layers=LAYERS, hidden=HIDDEN, vocab_size=VOCAB, heads=HEADS, row_dim=ROW_DIM,
        rows_per_head=rows // (len(LAYERS) * ORDERS * HEADS),
    )  # fmt: skip
    model = DecoderConfig(
        vocab_size=VOCAB, hidden=HIDDEN, layers=9, heads=8, ffn_hidden=2816, tie_embeddings=False,
        engrams={"engram": engram},
    )  # fmt: skip
    return Recipe(
        f"rows-{rows}-{prefetch}", model, out=folder, seq_len=1024, batch_size=64,
        steps=10_000, device="cuda", dtype="bf16", compile=True,
        table=TableRecipe(optimizer="rowwise_adam", codec="bf16", prefetch=prefetch),
    )  # fmt: skip


def lookups(trainer: Trainer, times: int = 23) -> tuple[list[float], list[float]]:
    """Milliseconds of a step's work outside the network: of the GPU, and from ids on the host to rows written back."""
    bank = trainer.banks["engram"]
    shape = (trainer.recipe.batch_size, trainer.recipe.seq_len, bank.config.embedding_dim)
    grad = torch.randn(shape, device="cuda").bfloat16()
    busy, spent = [], []
    for number in range(times):
        batch = trainer.data.batch(number).pin_memory()
        torch.cuda.synchronize()
        looked = profile(activities=[ProfilerActivity.CUDA]) if number % 2 else nullcontext()
        with looked:
            start = time.perf_counter()
            rows = bank.prefetch(Tokens(batch.tokens, doc_start=batch.doc_start))
            for layer in bank.config.layers:
                rows[0].wait(layer)
                rows.merge(layer, 0, grad)  # as a backward does; on a leaf of its own it would copy the gradient first
            rows.reduce()
            rows.apply()
            torch.cuda.synchronize()
            took = 1e3 * (time.perf_counter() - start)
        if isinstance(looked, profile):
            busy.append(sum(event.self_device_time_total for event in looked.key_averages()) / 1e3)
        else:
            spent.append(took)
    return busy[2:], spent[2:]


def touched(trainer: Trainer) -> int:
    """U: the distinct rows of a step."""
    batch = trainer.data.batch(0)
    rows = trainer.banks["engram"].prefetch(Tokens(batch.tokens, doc_start=batch.doc_start))
    found = rows.touched
    rows.discard()
    return found


def share(folder: str, text: Text | None) -> Text:
    """Measures lookup-share and lookup-exposed."""
    trainers = {ahead: Trainer(recipe(folder, 10_000_000, ahead), text=text) for ahead in (0, 1)}
    text = trainers[0].text
    steps = {
        "unoverlapped": trainers[0].train_step,
        "prefetched": trainers[1].train_step,
        "without-lookups": without_lookups(trainers[0]),
    }
    takes = {name: partial(wall_milliseconds, step, STEPS) for name, step in steps.items()}
    in_turns(takes, 1)
    taken = in_turns(takes, TURNS)
    busy, alone = lookups(trainers[0])
    whole = median(taken["unoverlapped"])
    for name, samples in taken.items():
        ratio = median(samples) / whole
        record("lookup-share", f"step-{name}", samples, "ms", reference=whole, ratio=ratio, device="cuda")
    record(
        "lookup-share", "lookups-by-the-clock", alone, "ms", reference=whole, ratio=median(alone) / whole, device="cuda"
    )
    record("lookup-share", "lookups-gpu", busy, "ms", reference=whole, ratio=median(busy) / whole, device="cuda")
    record("lookup-share", "of-the-step", [took / whole for took in busy], "share", reference=1.0, device="cuda")
    record("lookup-share", "distinct-rows", [float(touched(trainers[0]))], "rows", device="cuda")
    pairs = zip(taken["prefetched"], taken["without-lookups"], strict=True)
    record("lookup-exposed", "of-the-step", [(a - b) / a for a, b in pairs], "share", reference=1.0, device="cuda")
    return text


def flat(folder: str, text: Text) -> None:
    """Measures step-flat-rows: both tables in HBM at once, steps in turn."""
    beyond: dict[int, float] = {}
    trainers = {}
    for rows in (10_000_000, 300_000_000):
        trainers[rows] = trainer = Trainer(recipe(folder, rows, 1), text=text)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        wall_milliseconds(trainer.train_step, STEPS)
        beyond[rows] = (torch.cuda.max_memory_allocated() - held) / GIB
    times = in_turns(
        {str(rows): partial(wall_milliseconds, trainer.train_step, STEPS) for rows, trainer in trainers.items()},
        TURNS // 2,
    )
    small, large = times.values()
    for rows, samples in zip(trainers, times.values(), strict=True):
        name = f"{rows // 1_000_000}M-rows"
        record("step-flat-rows", f"step-{name}", samples, "ms", device="cuda")
        record("step-flat-rows", f"memory-beyond-{name}", [beyond[rows]], "GiB", device="cuda")
    ratios = [b / a for a, b in zip(small, large, strict=True)]
    record("step-flat-rows", "300M-over-10M-rows", ratios, "times", reference=1.0, device="cuda")


def main() -> None:
    """All claims, or with ``share`` the first two."""
    with tempfile.TemporaryDirectory() as folder:
        text = share(folder, None)
        if sys.argv[1:] == ["share"]:
            return
        gc.collect()
        torch.cuda.empty_cache()
        flat(str(Path(folder) / "flat"), text)


if __name__ == "__main__":
    main()
