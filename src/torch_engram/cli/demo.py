"""``engram demo``: train three small decoders and write a page about them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from torch_engram.studies.demo import DemoRun


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("engram-demo"),
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the runs' recipe, such as steps=50.")
    ] = None,
) -> None:
    """Train a dense decoder, a mixture of experts, and one with a memory; compare them in a report."""
    from rich.console import Console
    from rich.text import Text

    from torch_engram.cli.progress import progress_bar
    from torch_engram.studies.demo import LABELS, demo_recipe, run_demo
    from torch_engram.studies.demo_report import budget, build_report, write_report
    from torch_engram.train import change

    console = Console()
    shared = change(demo_recipe(out), settings or [])
    console.print(f"Preparing the corpus, then {len(LABELS)} runs of {shared.steps} steps.")
    runs = run_demo(shared, progress_bar)
    if any(run.trainer.stopped for run in runs.values()):
        console.print("Stopped: the demo compares whole runs, so run it again.")
        raise typer.Exit(130)
    console.print(f"MoE + Engram against MoE: {budget(runs)}.", soft_wrap=True)
    console.print(_results(runs))
    with console.status("Writing the report"):
        report = build_report(runs)
        page = write_report(report, out)
    for run in report.runs:
        for prompt, text in run.continuations:
            console.print(Text.assemble((f"{run.label}: ", "dim"), (prompt, "bold"), text), soft_wrap=True)
    console.print(f"Report: {page}", soft_wrap=True)


def _results(runs: dict[str, DemoRun]) -> Table:
    from rich.table import Column, Table

    from torch_engram.studies.demo import LABELS

    table = Table(
        Column("run", no_wrap=True),
        title=f"{next(iter(runs.values())).trainer.share_seen:.1%} of the training text seen",
    )
    for name in ("nats/token", "bits/byte", "total", "active", "tables", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, run in runs.items():
        score, size = run.outcome.score, run.account
        losses = (f"{score.nats:.4f}", f"{score.bits_per_byte:.4f}") if score is not None else ("-", "-")
        sizes = [f"{number / 1e6:.3f} M" for number in (size.total, size.active, size.tables)]
        table.add_row(LABELS[name], *losses, *sizes, f"{run.outcome.tokens_per_second:,.0f}")
    return table
