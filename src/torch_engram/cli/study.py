"""``engram study``: experiments with their controls, which anyone can run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from torch_engram.studies import STUDIES

if TYPE_CHECKING:
    from rich.table import Table

    from torch_engram.studies.facts.report import Row
    from torch_engram.studies.facts.study import FactsRun
    from torch_engram.studies.grid import Line
    from torch_engram.studies.training import TrainingRun


class _Studies(typer.core.TyperGroup):
    """Takes the file of a study for its name."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, next(iter(STUDIES)) if cmd_name.endswith(".py") else cmd_name)


study = typer.Typer(
    name="study",
    cls=_Studies,
    help="Run a study, one of these or one of your own: engram study MY_STUDY.py",
    no_args_is_help=True,
)


@study.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A study's folder.")]) -> None:
    """Write a study's tables and figures anew out of its log."""
    from torch_engram.studies.grid import all_results

    lines = all_results(folder)
    _write(str(lines[0]["study"]), lines, folder)


def _write(name: str, lines: Sequence[Line], folder: Path) -> None:
    from torch_engram.studies.report import write_report
    from torch_engram.studies.study import packages_of, report_of

    _require(*packages_of(name))
    write_report(report_of(name)(lines), folder)
    typer.echo(f"Log, tables and figures are in {folder}.")


def trainings(
    context: typer.Context,
    scale: Annotated[str | None, typer.Option(help="small, for a GPU, or tiny, for a try; or what it has.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Of every run; by default as many as it needs.")] = None,
    data: Annotated[str, typer.Option(help="A text file, a folder, or demo for the corpus that ships.")] = "demo",
    out: Annotated[Path | None, typer.Option(help="Folder for log and report; by default runs/NAME-SCALE.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    workers: Annotated[int, typer.Option(min=1, help="Runs at once.")] = 1,
) -> None:
    """Run its grid of trainings. Those that the folder's log has are not run again."""
    from rich.console import Console

    from torch_engram.bench.results import require_writable
    from torch_engram.studies.grid import run_grid
    from torch_engram.studies.study import find_study
    from torch_engram.studies.training import made_ready, train_run
    from torch_engram.train.build import require_device

    name, console = str(context.info_name), Console()
    found = find_study(name)
    scale = found.scales[0] if scale is None else scale
    runs = found.grid(scale, seeds)
    folder = Path("runs") / f"{Path(name).stem}-{scale}" if out is None else out
    require_device(device)
    require_writable(folder)
    _require(*found.packages)
    with console.status("Reading the text"):
        runs = made_ready(runs, data, device)
    console.print(f"{len(runs)} runs.")
    do = partial(train_run if workers > 1 else _told, data=data)
    _write(name, run_grid(runs, do, folder, study=name, scale=scale, device=device, workers=workers), folder)


for _name, _words in STUDIES.items():
    study.command(_name, help=f"{_words} {' '.join((trainings.__doc__ or '').split())}")(trainings)


def _told(run: TrainingRun, data: str) -> Iterator[dict[str, Any]]:
    """A run with its bar."""
    from torch_engram.studies.training import train_run

    with _bar(run.label, run.recipe.steps) as watch:
        yield from train_run(run, data, watch)


def _require(*packages: str) -> None:
    for name in packages:
        if find_spec(name) is None:
            raise ValueError(f"The study needs the package {name}: pip install 'torch-engram[studies]'.")


@study.command()
def facts(
    scale: Annotated[str, typer.Option(help="small, for a CPU, or full, for a GPU.")] = "small",
    out: Annotated[Path, typer.Option(help="Folder for log and report.")] = Path("facts-study"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Runs at once.")] = 1,
) -> None:
    """Teach SmolLM2 facts about people: by a memory, by LoRA, by full fine-tuning.

    Asked afterwards: the facts, in wordings that were trained and in others; capitals and elements, which the model
    knew before; other text. Runs that the folder's log has are not run again.
    """
    from rich.console import Console

    _require("transformers", "peft", "gguf", "matplotlib")
    from torch_engram.bench.results import require_writable
    from torch_engram.studies.facts.report import rows_of
    from torch_engram.studies.facts.study import full, run_facts, small
    from torch_engram.studies.grid import run_grid
    from torch_engram.studies.report import origins
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
    lines = run_grid(runs, do, out, study="facts", scale=scale, device=device, workers=workers)
    console.print(_table(rows_of(lines)))
    console.print("\n".join(origins(lines)), soft_wrap=True, highlight=False)
    _write("facts", lines, out)


def _watched(run: FactsRun, device: str) -> Iterator[dict[str, Any]]:
    """A run with its bar."""
    from torch_engram.studies.facts.study import run_facts

    with _bar(run.way, max(1, run.steps)) as watch:
        yield from run_facts(run, device, watch)


@contextmanager
def _bar(label: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Told of steps and their losses."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(label, total=steps, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.3f}")
        bar.update(task, completed=steps)


def _table(rows: list[Row]) -> Table:
    from rich.table import Table

    from torch_engram.studies.facts.report import CAPTION, HEAD, by_seeds, cells

    table = Table(box=None, padding=(0, 1, 0, 0), caption=CAPTION, caption_justify="left")
    for place, name in enumerate(HEAD):
        table.add_column(name, justify="right" if place else "left")
    for seeds in by_seeds(rows):
        table.add_row(*cells(seeds))
    return table
