"""``engram eval``: tasks of lm-evaluation-harness on a model with its memories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from torch_engram.hub.evaluate import Evaluation


def evaluate(
    model: Annotated[Path, typer.Argument(help="A folder of a model that was saved with its memories.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Names of tasks or groups, with commas between them.")],
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="FOLDER", help="Also look for tasks here.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also run with the memories disabled.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Examples of each task, at most.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences of a batch.")] = 8,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Also write the results as JSON.")] = None,
) -> None:
    """Evaluate a model with its memories by lm-evaluation-harness.

    For example: engram eval with-notes --tasks arc_easy,lambada_openai --compare
    """
    import logging
    from dataclasses import asdict

    from rich.console import Console

    from torch_engram.cli.tables import print_whole

    try:
        from transformers import AutoTokenizer

        from torch_engram.hub import from_pretrained
        from torch_engram.hub.evaluate import evaluate as run
        from torch_engram.hub.evaluate import find_tasks
    except ImportError as error:
        raise ValueError(str(error)) from error
    from torch_engram.durable import write_json
    from torch_engram.train.build import require_device

    require_device(device)
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {out.parent} for --out: make it, or give another file.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    chosen = find_tasks([name.strip() for name in tasks.split(",")], include_path)
    loaded = from_pretrained(model, device_map=device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = run(loaded, tokenizer, chosen, limit=limit, batch_size=batch_size, compare=compare)
    print_whole(Console(), _table(found))
    if out is not None:
        write_json(out, asdict(found))


def _table(found: Evaluation) -> Table:
    from rich.table import Column, Table

    table = Table(Column("task"), Column("metric"), box=None, header_style="bold", pad_edge=False)
    for name in ("with memory", "±") if found.without is None else ("with memory", "±", "without", "difference"):
        table.add_column(name, justify="right")
    for score in found.scores():
        better = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        cells = [f"{score.value:.4f}", "" if score.error is None else f"{score.error:.4f}"]
        if score.without is not None:
            cells += [f"{score.without:.4f}", f"{score.value - score.without:+.4f}"]
        table.add_row(score.task, score.metric + better, *cells)
    return table
