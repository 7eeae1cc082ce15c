"""``engram analyze lens`` and ``engram analyze cka``: what a model's layers predict, and which are like which."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

Model = Annotated[
    Path, typer.Argument(help="A run's folder, one of its checkpoints, or a folder of a transformers model.")
]
Source = Annotated[str, typer.Option("--text", metavar="FILE", help="A text to read; by default the shipped corpus.")]
Tokens = Annotated[int, typer.Option("--tokens", min=2, help="How many of its tokens to read.")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for programs.")]


def lens(
    checkpoint: Model, text: Source = "demo", tokens: Tokens = 16384, device: Device = "cpu", as_json: AsJson = False
) -> None:
    """Measure how far each layer is from the model's prediction, with the memory and without: the logit lens.

    KL of what a layer would predict from what the model does, in nats a token, after 0 blocks (the embedding) to all.
    """
    from torch_engram.analysis.lens import logit_lens
    from torch_engram.analysis.reading import read_text
    from torch_engram.analysis.subject import open_subject
    from torch_engram.train.build import require_device

    require_device(device)
    subject = open_subject(checkpoint, device)
    batches = [reading.batch for reading in read_text(text, subject.tokenizer, tokens)]
    found, without = logit_lens(subject, batches), None
    if subject.has_memory:
        with subject.disabled():
            without = logit_lens(subject, batches)
    if as_json:
        off = None if without is None else without.nats
        typer.echo(json.dumps({"tokens": found.tokens, "kl": found.nats, "kl_without_memory": off}))
        return
    columns = {"KL": found.nats} if without is None else {"KL": found.nats, "KL without memory": without.nats}
    _print(columns, f"Nats a token, over {found.tokens:,} tokens.")


def cka(
    checkpoint: Model,
    other: Model,
    text: Source = "demo",
    tokens: Tokens = 16384,
    entities: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only the last tokens of these texts, one a line.")
    ] = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs, with all similarities.")] = False,
) -> None:
    """Find the layers of another model that each layer of a model is like, by centred kernel alignment (CKA).

    Layers are told by the blocks that come before them, 0 for the embedding. A layer's depth in the other model is the
    mean over the five layers there that are most like it, weighed by their similarity (the Engram paper, equation 9).
    Both models must have the same tokenizer.
    """
    from torch_engram.analysis.cka import NEAREST, cka_matrix, soft_alignment
    from torch_engram.analysis.reading import read_text
    from torch_engram.analysis.subject import open_subject
    from torch_engram.train.build import require_device

    require_device(device)
    named = [] if entities is None else _lines(entities)
    first, second = open_subject(checkpoint, device), open_subject(other, device)
    if first.tokenizer.get_vocab() != second.tokenizer.get_vocab():
        raise ValueError(
            f"{checkpoint} and {other} have different tokenizers, and CKA compares states at the same tokens: give two "
            "models that were trained with one tokenizer."
        )
    readings = read_text(text, first.tokenizer, tokens, entities=named)
    similarity = cka_matrix(first, second, readings)
    depths, best = soft_alignment(similarity).tolist(), similarity.max(1)
    positions = sum(int(reading.chosen.sum()) for reading in readings)
    if as_json:
        alignment = [depth if depth == depth else None for depth in depths]  # JSON has no NaN
        found = {"positions": positions, "nearest": NEAREST, "alignment": alignment, "cka": similarity.tolist()}
        typer.echo(json.dumps(found))
        return
    columns = {"depth there": depths, "most like": best.indices.tolist(), "CKA": best.values.tolist()}
    _print(columns, f"At {positions:,} positions; depth in {other}.")


def _lines(path: Path) -> list[str]:
    found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{path} names no entity: write one a line.")
    return found


def _print(columns: Mapping[str, Sequence[float]], below: str) -> None:
    """A row a state."""
    from rich.console import Console

    from torch_engram.cli.tables import print_whole

    console = Console(highlight=False)
    print_whole(console, _table(columns))
    console.print(below, soft_wrap=True)


def _table(columns: Mapping[str, Sequence[float]]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("after blocks", *columns):
        table.add_column(name, justify="right")
    for blocks, cells in enumerate(zip(*columns.values(), strict=True)):
        table.add_row(str(blocks), *(str(cell) if isinstance(cell, int) else f"{cell:.4f}" for cell in cells))
    return table
