"""``engram analyze``: instruments that look into a trained model, into its tables, or into a text."""

from __future__ import annotations

import typer

from torch_engram.cli.analyze_networks import ablate, cka, lens, locate
from torch_engram.cli.analyze_tables import collisions, usage

analyze = typer.Typer(
    name="analyze", help="Look into a trained model with a memory, and into a text.", no_args_is_help=True
)
for verb in (lens, cka, ablate, usage, collisions, locate):
    analyze.command()(verb)
