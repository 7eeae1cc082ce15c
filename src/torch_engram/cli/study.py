"""``engram study``: experiments with their controls, which anyone can run again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from torch_engram.studies.facts.report import Row
    from torch_engram.studies.facts.study import FactsRun

study = typer.Typer(name="study", help="Run a study, and see its results.", no_args_is_help=True)


@study.callback()
def _studies() -> None:
    """Keeps ``facts`` a verb of its own while it is the only one."""


@study.command()
def facts(
    scale: Annotated[str, typer.Option(help="small, for a CPU, or full, for a GPU.")] = "small",
    out: Annotated[Path, typer.Option(help="Folder for the log, the table and the figure.")] = Path("facts-study"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Runs at once.")] = 1,
) -> None:
    """Teach SmolLM2 facts about people: by a memory, by LoRA, by full fine-tuning.

    Asked afterwards: the facts, in wordings that were trained and in others; capitals and elements, which the model
    knew before; other text. Runs that the folder's log has are not run again.
    """
    from rich.console import Console

    for name in ("transformers", "peft", "gguf", "matplotlib"):
        if find_spec(name) is None:
            raise ValueError(f"The study needs the package {name}: pip install 'torch-engram[studies]'.")
    from torch_engram.bench.results import require_writable
    from torch_engram.studies.facts.report import rows_of, where, write_report
    from torch_engram.studies.facts.study import full, run_facts, small
    from torch_engram.studies.grid import run_grid
    from torch_engram.train.build import require_device

    require_device(device)
    require_writable(out)
    scales = {"small": small, "full": full}
    if scale not in scales:
        raise ValueError(f"--scale is {scale!r}: give small or full.")
    runs, console = scales[scale](), Console()
    console.print(
        f"{runs[0].scale.people} people, 3 facts each, are taught to SmolLM2-135M, whose weights come in 4 bits; "
        f"{len(runs)} runs.",
        soft_wrap=True,
    )
    do = partial(_watched if workers == 1 else run_facts, device=device)
    rows = rows_of(run_grid(runs, do, out, device=device, workers=workers))
    console.print(_table(rows))
    write_report(rows, out)
    console.print(where(rows), soft_wrap=True, highlight=False)
    console.print(f"Log, table and figure are in {out}.", soft_wrap=True)


def _watched(run: FactsRun, device: str) -> Iterator[dict[str, Any]]:
    """A run with its bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from torch_engram.studies.facts.study import run_facts

    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(run.way, total=max(1, run.steps), loss="")
        yield from run_facts(run, device, lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.3f}"))
        bar.update(task, completed=max(1, run.steps))


def _table(rows: list[Row]) -> Table:
    from rich.table import Table

    from torch_engram.studies.facts.report import CAPTION, HEAD, by_seeds, cells

    table = Table(box=None, padding=(0, 1, 0, 0), caption=CAPTION, caption_justify="left")
    for place, name in enumerate(HEAD):
        table.add_column(name, justify="right" if place else "left")
    for seeds in by_seeds(rows):
        table.add_row(*cells(seeds))
    return table
