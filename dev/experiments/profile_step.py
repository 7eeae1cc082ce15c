"""Where a training step of a recipe spends its time on a GPU: its kernels, its idle gaps, and its parts.

    python dev/experiments/profile_step.py RECIPE [SETTING=VALUE ...]

Kernels are those of three steps, captured or not as the recipe has it. A gap is a time in which no kernel and no copy
runs on any stream. Parts are timed by events on the stream that trains: forward and backward, clipping, and the
optimisers' steps; what runs beside them shows in none.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from torch_engram.bench.steps import Runs
from torch_engram.train.loop import Trainer
from torch_engram.train.recipes import get_recipe
from torch_engram.train.settings import change

STEPS, KERNELS, GAPS = 3, 60, 12


def trace(trainer: Trainer, folder: Path) -> list[dict[str, Any]]:
    """What the GPU did in some steps, by time."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            trainer.train_step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return sorted((event for event in events if event.get("cat") in kinds), key=lambda event: event["ts"])


def show(events: list[dict[str, Any]]) -> None:
    """Kernels by the time that they took, and gaps by their length, per step."""
    spent, count = defaultdict(float), defaultdict(int)
    gaps, end, busy, last = [], events[0]["ts"], 0.0, ""
    for event in events:
        spent[event["name"]] += event["dur"]
        count[event["name"]] += 1
        if event["ts"] > end:
            gaps.append((event["ts"] - end, last, event["name"]))
        busy += max(0.0, event["ts"] + event["dur"] - max(end, event["ts"]))
        if event["ts"] + event["dur"] > end:
            end, last = event["ts"] + event["dur"], event["name"]
    each = [f"{time / STEPS / 1e3:.2f}" for time in (end - events[0]["ts"], busy, sum(spent.values()))]
    print(f"{each[0]} ms a step, the GPU busy {each[1]}, all kernels {each[2]}")
    for name in sorted(spent, key=lambda name: -spent[name])[:KERNELS]:
        print(f"{spent[name] / STEPS / 1e3:9.3f} ms {count[name] / STEPS:6.1f} {name[:150]}")
    print(f"gaps: {sum(gap for gap, *_ in gaps) / STEPS / 1e3:.2f} ms a step")
    for gap, before, after in sorted(gaps, reverse=True)[:GAPS]:
        print(f"{gap / 1e3:9.3f} ms after {before[:60]} before {after[:60]}")


def parts(trainer: Trainer) -> None:
    """Milliseconds of the parts of a step on its own stream."""
    marks: dict[str, list[torch.cuda.Event]] = defaultdict(list)

    def marked(owner: Any, method: str, name: str) -> None:
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call(*args, **kwargs)
            end.record()
            marks[name] += [begin, end]
            return result

        setattr(owner, method, timed)

    marked(trainer, "network_pass", "forward and backward")
    marked(trainer, "_clip", "clipping")
    for optimizer in trainer.optimizers:
        marked(optimizer, "step", type(optimizer).__name__)
    for _ in range(STEPS):
        trainer.train_step()
    torch.cuda.synchronize()
    for name, events in marks.items():
        took = sum(a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True)) / STEPS
        print(f"{name}: {took:.2f} ms")


def main() -> None:
    recipe = change(get_recipe(sys.argv[1]), sys.argv[2:])
    with tempfile.TemporaryDirectory() as folder:
        run = Runs(folder).start(recipe)
        print(f"{recipe.name}: {', '.join(f'{run.take(4):.2f}' for _ in range(5))} ms a step")
        show(trace(run.trainer, Path(folder)))
        parts(run.trainer)


if __name__ == "__main__":
    main()
