"""``engram train``: pretrain a decoder from a recipe."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from torch_engram.train import Outcome, Recipe


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name; `engram recipes` lists them.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field by dotted name; may be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    nproc: Annotated[
        int, typer.Option("--nproc", min=1, help="Ranks of this machine that train together, on a GPU each.")
    ] = 1,
) -> None:
    """Pretrain a decoder with its memory on a text file, a folder or a dataset.

    For example: engram train tiny --set data=my_text.txt --set steps=500 --set model.hidden=128
    """
    from torch_engram.train import change, get_recipe
    from torch_engram.train.build import require_machine
    from torch_engram.train.ranks import launched_ranks

    chosen = change(get_recipe(recipe), settings or [])
    arguments = ["train", recipe, *(part for setting in settings or [] for part in ("--set", setting))]
    ranks = launched_ranks()
    if ranks > 1 and nproc > 1:
        raise ValueError(
            f"This is one of {ranks} ranks already: leave out --nproc, or start the command without torchrun."
        )
    require_machine(chosen, max(ranks, nproc))
    if ranks == 1 and nproc > 1:
        from torch_engram.cli.launch import launch

        launch(nproc, chosen.device, [*arguments, *(["--resume"] if resume else [])])
        return
    if ranks == 1:
        outcome = _train(chosen, resume, arguments, None)
    else:
        from torch_engram.cli.launch import as_rank

        with as_rank(chosen.device) as group:
            outcome = _train(chosen, resume, [*arguments, "--nproc", str(ranks)], group)
    if outcome.interrupted:
        raise typer.Exit(130)


def _train(chosen: Recipe, resume: bool, arguments: list[str], group: ProcessGroup | None) -> Outcome:
    """Train and tell; of several ranks one tells. ``arguments``: of ``engram``, to do it again."""
    from rich.console import Console

    from torch_engram.cli.progress import progress_bar
    from torch_engram.train import Trainer

    console = Console(quiet=group is not None and group.rank() > 0)
    with console.status("Reading the corpus"):
        trainer = Trainer(chosen, resume_run=resume, group=group)
    console.print(f"Parameters: {trainer.account.describe()}.", soft_wrap=True)
    bar = nullcontext() if console.quiet else progress_bar(chosen.name, chosen.steps, trainer.step)
    with bar as watch:
        outcome = trainer.run(watch)
    if outcome.interrupted:
        again = shlex.join(["engram", *arguments])
        console.print(
            f"Stopped after step {outcome.step}; saved {outcome.checkpoint}. Go on with: {again} --resume",
            soft_wrap=True,
        )
        return outcome
    if outcome.score is not None:
        console.print(
            f"Validation: {outcome.score.nats:.4f} nats/token, {outcome.score.bits_per_byte:.4f} bits/byte "
            f"over {outcome.score.tokens:,} tokens.",
            soft_wrap=True,
        )
    console.print(f"Saved {outcome.checkpoint}; {trainer.share_seen:.1%} of the training text seen.", soft_wrap=True)
    return outcome
