"""Progress bars: of a training run (steps, loss, tokens a second, time left), and of a file (bytes or rows)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rich.console import Console

    from torch_engram.train.loop import Progress as Step


@contextmanager
def progress_bar(label: str, steps: int, done: int = 0) -> Iterator[Callable[[Step], None]]:
    """A bar for one run; the value is called with the loop's progress after every step."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tok/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(label, total=steps, completed=done, loss="     -", speed="     -")

        def watch(step: Step) -> None:
            speed = f"{step.tokens_per_second:6,.0f}"
            bar.update(task, completed=step.step, loss=f"{step.loss:6.3f}", speed=speed)

        yield watch


@contextmanager
def amount_bar(console: Console, total: int, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A bar for bytes or for rows, on a terminal; the value is called with how many more there are."""
    done = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = BarColumn(), done, TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda more: bar.update(task, advance=more)
