"""mfu-dense, moe-vs-dense, engram-overhead, small-run: training speed of the reference decoder on one GPU.

All train for real: natural text, mixed precision, compiled blocks, Muon and Adam, clipping. Tokens a second are those
of whole steps, data included. The steps of models that are compared take turns.

- mfu-dense: 290 M parameters beside embedding and head, sequences of 4,096, each one document. Model FLOPs are counted
  from the configuration (3 times the forward's products and causal attention, nothing for recomputation) over
  989 TFLOP/s, an H100's dense bf16 rate.
- moe-vs-dense: tokens a second of a mixture of experts over the dense decoder's, both with 116 M active parameters
  (9 layers, hidden 1024), at 131,072 tokens a step; beside it the same at hidden 512.
- engram-overhead: step time of ``small-engram``, its experts matched to ``small-moe`` in total and active parameters
  (both are recorded), over ``small-moe``'s.
- small-run: tokens a second of ``small-engram`` as it is: hidden 512, 8 layers, 131,072 tokens a step. With
  ``small-run-options``, also at 65,536 tokens a step with every option of the trainer on its own, and together.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from record import record

from torch_engram.bench.steps import Run, Runs
from torch_engram.bench.timing import in_turns
from torch_engram.data import open_corpus
from torch_engram.models import DecoderConfig, MoEConfig
from torch_engram.models.accounting import account, match_budget
from torch_engram.train.recipes import get_recipe

PEAK = 989e12
TURNS, STEPS = 6, 12
"""A turn begins and ends with an idle GPU, which training does not: many steps keep that small."""


def milliseconds(*runs: Run) -> list[list[float]]:
    """Mean step times of each run, one a turn."""
    return list(in_turns({str(i): partial(run.take, STEPS) for i, run in enumerate(runs)}, TURNS).values())


def report(claim: str, name: str, run: Run, samples: list[float]) -> None:
    """What is recorded of every model beside its claim."""
    trainer = run.trainer
    tokens = trainer.recipe.tokens_per_step
    speeds = [tokens / took / 1e3 for took in samples]
    counted = trainer.account
    record(claim, f"{name}-speed", speeds, "M tokens/s", device="cuda")
    record(claim, f"{name}-utilisation", [3 * counted.flops * s * 1e6 / PEAK for s in speeds], "of peak", device="cuda")
    for size in ("total", "active"):
        record(claim, f"{name}-{size}-parameters", [getattr(counted, size) / 1e6], "M", device="cuda")


def mfu_dense(runs: Runs) -> None:
    text = "\n\n".join(open_corpus("demo"))
    corpus = Path(runs.folder) / "long.jsonl"
    corpus.write_text(json.dumps({"text": text}))
    model = DecoderConfig(vocab_size=16_384, hidden=1280, layers=13, heads=10, ffn_hidden=4096, tie_embeddings=False)
    base = replace(get_recipe("small-dense"), name="mfu", model=model, seq_len=4096, batch_size=16)
    run = runs.start(replace(base, data=str(corpus), validation_share=0.0))
    (samples,) = milliseconds(run)
    flops = 3 * run.trainer.account.flops * base.tokens_per_step
    record("mfu-dense", "utilisation", [flops / (took / 1e3) / PEAK for took in samples], "of peak", device="cuda")
    report("mfu-dense", "dense", run, samples)


def moe_vs_dense(runs: Runs) -> None:
    dense = DecoderConfig(vocab_size=16_384, hidden=1024, layers=9, heads=8, ffn_hidden=2816, tie_embeddings=False)
    moe = replace(dense, moe=MoEConfig(experts=32, top_k=3, expert_hidden=704, shared_hidden=704))
    base = replace(get_recipe("small-dense"), batch_size=64, accumulation=2)
    pairs = {
        "": (replace(base, name="dense-1024", model=dense), replace(base, name="moe-1024", model=moe)),
        "small-": (get_recipe("small-dense"), get_recipe("small-moe")),
    }
    for prefix, recipes in pairs.items():
        started = [runs.start(recipe) for recipe in recipes]
        taken = milliseconds(*started)
        ratios = [a / b for a, b in zip(*taken, strict=True)]
        record("moe-vs-dense", f"{prefix}moe-over-dense", ratios, "times", reference=1.0, device="cuda")
        for name, run, samples in zip(("dense", "moe"), started, taken, strict=True):
            report("moe-vs-dense", prefix + name, run, samples)
        del started, run
        clear()


def engram_overhead(runs: Runs) -> None:
    moe, engram = get_recipe("small-moe"), get_recipe("small-engram")
    tables = account(engram.model).tables
    model = match_budget(moe.model, engram.model, tables)
    assert model.moe is not None
    aligned = replace(model.moe, shared_hidden=round(model.moe.shared_hidden / 8) * 8)  # as matrix products want it
    matched = replace(engram, name="matched", model=replace(model, moe=aligned))
    started = [runs.start(recipe) for recipe in (moe, matched)]
    taken = milliseconds(*started)
    ratios = [b / a for a, b in zip(*taken, strict=True)]
    record("engram-overhead", "engram-over-moe", ratios, "times", reference=1.0, device="cuda")
    for name, run, samples in zip(("moe", "engram"), started, taken, strict=True):
        record("engram-overhead", f"{name}-step", samples, "ms", device="cuda")
        report("engram-overhead", name, run, samples)


def small_run(runs: Runs) -> None:
    run = runs.start(get_recipe("small-engram"))
    (samples,) = milliseconds(run)
    tokens = run.trainer.recipe.tokens_per_step
    record("small-run", "speed", [tokens / took / 1e3 for took in samples], "M tokens/s", device="cuda")
    record("small-run", "peak-memory", [torch.cuda.max_memory_allocated() / 2**30], "GiB", device="cuda")
    report("small-run", "engram", run, samples)


OPTIONS = {
    "none": {"compile": False},
    "compile": {},
    "compile-recompute": {"recompute": True},
    "compile-accumulation": {"accumulation": 2, "batch_size": 32},
    "compile-capture": {"capture": True},
    "compile-deterministic": {"deterministic": True},
    "capture": {"compile": False, "capture": True},
    "together": {"recompute": True, "accumulation": 2, "batch_size": 32, "capture": True},
}


def options(runs: Runs) -> None:
    """``small-engram`` at 65,536 tokens a step under each option of the trainer, and under all that keep its speed."""
    for name, changes in OPTIONS.items():
        alone = {"name": name, "batch_size": 64, "compile": True, "capture": False}
        recipe = replace(get_recipe("small-engram"), **{**alone, **changes})
        run = runs.start(recipe)
        (samples,) = milliseconds(run)
        speeds = [recipe.tokens_per_step / took / 1e3 for took in samples]
        record("small-run", f"{name}-speed", speeds, "M tokens/s", device="cuda")
        record("small-run", f"{name}-memory", [run.memory or 0.0], "GiB", device="cuda")
        del run
        clear()


def clear() -> None:
    """Give back what the last models held, and forget what was compiled for their shapes."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


CLAIMS: dict[str, Callable[[Runs], None]] = {
    "small-run": small_run,
    "small-run-options": options,
    "engram-overhead": engram_overhead,
    "moe-vs-dense": moe_vs_dense,
    "mfu-dense": mfu_dense,
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(folder)
        for claim in sys.argv[1:] or CLAIMS:
            CLAIMS[claim](runs)
            clear()


if __name__ == "__main__":
    main()
