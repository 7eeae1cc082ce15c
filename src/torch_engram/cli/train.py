"""``engram train``: pretrain a decoder from a recipe."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name; `engram recipes` lists them.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field by dotted name; may be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
) -> None:
    """Pretrain a decoder with its memory on a text file, a folder or a dataset.

    For example: engram train tiny --set data=my_text.txt --set steps=500 --set model.hidden=128
    """
    from rich.console import Console

    from torch_engram.cli.progress import progress_bar
    from torch_engram.train import Trainer, change, get_recipe

    console = Console()
    chosen = change(get_recipe(recipe), settings or [])
    with console.status("Reading the corpus"):
        trainer = Trainer(chosen, resume_run=resume)
    console.print(f"Parameters: {trainer.account.describe()}.", soft_wrap=True)
    with progress_bar(chosen.name, chosen.steps, trainer.step) as watch:
        outcome = trainer.run(watch)
    if outcome.interrupted:
        again = ["engram", "train", recipe, *(part for setting in settings or [] for part in ("--set", setting))]
        console.print(
            f"Stopped after step {outcome.step}; saved {outcome.checkpoint}. Go on with: {shlex.join(again)} --resume",
            soft_wrap=True,
        )
        raise typer.Exit(130)
    if outcome.score is not None:
        console.print(
            f"Validation: {outcome.score.nats:.4f} nats/token, {outcome.score.bits_per_byte:.4f} bits/byte "
            f"over {outcome.score.tokens:,} tokens.",
            soft_wrap=True,
        )
    console.print(f"Saved {outcome.checkpoint}; {trainer.share_seen:.1%} of the training text seen.", soft_wrap=True)
