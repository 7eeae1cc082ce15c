"""``engram finetune``: give a model of transformers a memory, and train it on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def finetune(
    model: Annotated[str, typer.Argument(help="A folder of a causal model, or its name on the Hugging Face hub.")],
    data: Annotated[str, typer.Option("--data", help="A text file, a folder of them, or a dataset's name.")],
    out: Annotated[Path, typer.Option("--out", help="Where the model with its memory is saved.")],
    lora: Annotated[bool, typer.Option("--lora", help="Train LoRA adapters with the memory.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train all weights with the memory.")] = False,
    memory_only: Annotated[bool, typer.Option("--memory-only", help="Train the memory alone: the default.")] = False,
    layers: Annotated[str, typer.Option("--layers", help="Blocks, from 0, that read the memory.")] = "1",
    rows: Annotated[int, typer.Option("--rows-per-head", min=2, help="Rows of a hash head.")] = 50_000,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Hash heads of each order.")] = 8,
    row_dim: Annotated[int, typer.Option("--row-dim", min=1, help="Numbers of a row.")] = 64,
    placement: Annotated[str, typer.Option("--placement", help="Where rows live: device or host.")] = "device",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.")] = 500,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences of a micro-batch.")] = 8,
    accumulation: Annotated[int, typer.Option("--accumulation", min=1, help="Micro-batches of a step.")] = 1,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens of a sequence.")] = 512,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of modules, adapters and weights.")] = 1e-3,
    row_lr: Annotated[float, typer.Option("--row-lr", help="Learning rate of rows.")] = 1e-2,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between checkpoints.")] = 100,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
) -> None:
    """Give a causal model of transformers a memory, and train it on text.

    For example: engram finetune HuggingFaceTB/SmolLM2-135M --data notes.txt --out with-notes
    """
    if lora + full + memory_only > 1:
        raise ValueError("--memory-only, --lora and --full are three ways to train: choose one.")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    try:
        from torch_engram.hub.finetune import Finetuning
        from torch_engram.hub.finetune import finetune as run
    except ImportError as error:
        raise ValueError(str(error)) from error

    plan = Finetuning(
        model, data, str(out), trains="lora" if lora else "full" if full else "memory",
        memory={"layers": _blocks(layers), "rows_per_head": rows, "heads": heads, "row_dim": row_dim},
        placement=placement, steps=steps, batch_size=batch_size, accumulation=accumulation, seq_len=seq_len, lr=lr,
        row_lr=row_lr, save_every=save_every, device=device,
    )  # fmt: skip
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn()
    with Progress(*columns) as bar:
        task = bar.add_task("", total=steps, loss=float("nan"))
        done = run(plan, resume, lambda step, loss: bar.update(task, completed=step, loss=loss))
    console = Console()
    if done.before is not None and done.after is not None:
        console.print(f"Held-out text: {done.before:.4f} nats/token before, {done.after:.4f} after.", soft_wrap=True)
    console.print(f"Saved {out}: {done.rows_touched:,} rows trained, {done.tokens:,} tokens.", soft_wrap=True)


def _blocks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--layers is {text!r}: give block numbers, such as 1,4.") from error
