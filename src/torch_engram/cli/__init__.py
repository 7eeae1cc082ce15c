"""The ``engram`` command: one small file a verb. Verbs import torch only when they run, so help is instant."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from torch_engram import __version__
from torch_engram.cli.analyze import analyze
from torch_engram.cli.bench import bench
from torch_engram.cli.bench_lookup import lookup
from torch_engram.cli.demo import demo
from torch_engram.cli.evaluate import evaluate
from torch_engram.cli.finetune import finetune
from torch_engram.cli.gates import gates
from torch_engram.cli.plan import plan
from torch_engram.cli.recipes import recipes
from torch_engram.cli.sample import sample
from torch_engram.cli.sentences import sentence
from torch_engram.cli.study import study
from torch_engram.cli.table import table
from torch_engram.cli.trace import trace
from torch_engram.cli.train import train


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"torch-engram {__version__}")
        raise typer.Exit


app = typer.Typer(
    help="Conditional memory for language models: train, sample, and look inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


for verb in (demo, train, finetune, recipes, sample, trace, gates, plan):
    app.command()(verb)
app.command("eval")(evaluate)
app.add_typer(table)
bench.command()(lookup)
app.add_typer(bench)
app.add_typer(study)
app.add_typer(analyze)


def main() -> None:
    """Run the command; a user's mistake is one sentence on standard error and exit code 1.

    With ``ENGRAM_TRACEBACK=1`` in the environment it is the whole traceback.
    """
    # Before torch is loaded: threads that wait by spinning crawl as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.formatwarning = lambda message, *_, **__: f"engram: {message}\n"
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("ENGRAM_TRACEBACK") == "1":
            raise
        sys.exit(f"engram: {sentence(error)}")
