"""``engram analyze lens``, ``cka``, ``ablate`` and ``locate``: what layers predict, and what memories do for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

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


def ablate(
    checkpoint: Model,
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="FILE", help="A text to read; may be repeated.")
    ] = None,
    tokens: Tokens = 16384,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Switch a memory off at inference, as a whole and at one block at a time: what each text's loss then is.

    For example: engram analyze ablate runs/tiny --text facts.txt --text code.txt
    """
    from dataclasses import asdict

    from torch_engram.analysis.ablation import ablate as measure
    from torch_engram.analysis.reading import read_text
    from torch_engram.analysis.subject import open_subject
    from torch_engram.train.build import require_device

    require_device(device)
    subject, found = open_subject(checkpoint, device), {}
    for source in text or ["demo"]:
        found[source] = measure(subject, [each.batch for each in read_text(source, subject.tokenizer, tokens)])
    if as_json:
        named = {source: asdict(one) | {"without_one": _by_name(one.without_one)} for source, one in found.items()}
        typer.echo(json.dumps(named, ensure_ascii=False))
        return
    first = next(iter(found.values()))
    head = ("text", "tokens", "nats", "without", *(f"without {name}" for name in _by_name(first.without_one)))
    rows = [
        (source, f"{one.tokens:,}", f"{one.whole:.4f}",
         *(f"{loss:.4f} ({loss - one.whole:+.4f})" for loss in (one.without, *one.without_one.values())))
        for source, one in found.items()
    ]  # fmt: skip
    _print_rows(head, rows, "Nats a token, and what is lost.")


def _by_name(values: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """By memory and block, as people write them."""
    return {f"{name} at {layer}": value for (name, layer), value in values.items()}


def locate(
    checkpoint: Model,
    prompt: Annotated[str, typer.Option(help="What comes before, such as 'Paris is the capital of'.")],
    answer: Annotated[str, typer.Option(help="What is to follow, with its space: ' France'.")],
    top: Annotated[int, typer.Option(min=1, help="N-grams to show.")] = 12,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Find the n-grams whose rows make an answer likely: what it loses without each, and what its gradient says."""
    from dataclasses import asdict

    from torch_engram.analysis.locating import locate as find
    from torch_engram.analysis.subject import open_subject
    from torch_engram.train.build import require_device

    require_device(device)
    found = find(open_subject(checkpoint, device), prompt, answer)
    if as_json:
        typer.echo(json.dumps(asdict(found), ensure_ascii=False))
        return
    rows = [
        (repr(one.text), f"{one.memory} at {one.layer}", str(one.order), f"{one.lost:+.4f}", f"{one.attributed:+.4f}")
        for one in found.carriers[:top]
    ]
    said = f"The answer's log-probability is {found.log_probability:.3f}, and {found.without:.3f} without a memory."
    if half := found.half():
        said += f" {half} of {len(found.carriers)} n-grams lose half of what all lose one by one."
    _print_rows(("n-gram", "memory", "order", "lost", "attributed"), rows, said)


def _print_rows(head: Sequence[str], rows: Sequence[Sequence[str]], said: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from torch_engram.cli.tables import print_whole

    console, shown = Console(highlight=False), Table(box=None, header_style="bold", pad_edge=False)
    for place, name in enumerate(head):
        shown.add_column(name, justify="right" if place else "left")
    for row in rows:
        shown.add_row(*row)
    print_whole(console, shown)
    console.print(f"\n{said}", soft_wrap=True, markup=False)


def _print(columns: Mapping[str, Sequence[float]], below: str) -> None:
    """A row a state."""
    rows = [
        (str(blocks), *(str(cell) if isinstance(cell, int) else f"{cell:.4f}" for cell in cells))
        for blocks, cells in enumerate(zip(*columns.values(), strict=True))
    ]
    _print_rows(("after blocks", *columns), rows, below)
