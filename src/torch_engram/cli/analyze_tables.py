"""``engram analyze collisions`` and ``usage``: how n-grams fall on rows, and how a trained memory's rows were used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from rich.table import Table
    from tokenizers import Tokenizer

    from torch_engram.addressing import Addressing
    from torch_engram.analysis import Collisions, DistinctNgrams, Sharing, TableUsage
    from torch_engram.config import EngramConfig

    Ints = np.ndarray[Any, np.dtype[Any]]

_VOCAB_SIZE = 16_384  # of a tokenizer that is trained on the text, as for the small recipes


def collisions(
    text: Annotated[str, typer.Option(help="A file or folder of text.")],
    preset: Annotated[str | None, typer.Option(help="A published configuration, such as deepseek-v4.1.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A run's folder, or one of its checkpoints.")] = None,
    rows: Annotated[
        list[int] | None, typer.Option("--rows", min=2, help="Rows of a head; may be repeated, for several sizes.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="With --rows: heads of an order, by default 8.")] = None,
    max_ngram: Annotated[int | None, typer.Option(min=2, help="With --rows: the highest order, by default 3.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json; with --rows by default one is trained on the text.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Read so many tokens of the text; by default all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs, with every head.")] = False,
) -> None:
    """Count the n-grams of a text that share a row with another one, against what a uniform random hash would do.

    For example: engram analyze collisions --rows 100000 --rows 1000000 --text my_text.txt --tokens 10000000
    """
    from rich.console import Console

    if sum(source is not None for source in (preset, checkpoint, rows or None)) != 1:
        raise ValueError("Say where the rows are: give one of --preset, --checkpoint and --rows.")
    if not rows and (heads or max_ngram):
        raise ValueError("Presets and checkpoints have their own heads and orders: leave out --heads and --max-ngram.")
    with Console(stderr=True).status("Reading the text"):
        reader, addressings = _addressings(preset, checkpoint, rows or [], heads or 8, max_ngram or 3, text, tokenizer)
        ids, starts = _read(text, reader, tokens)
    with Console(stderr=True).status("Counting n-grams"):
        found = _collisions(addressings, ids, starts)
    if as_json:
        typer.echo(_collisions_json(found, text, len(ids)))
    else:
        _print_collisions(found, text, len(ids))


def _addressings(
    preset: str | None,
    checkpoint: Path | None,
    rows: Sequence[int],
    heads: int,
    max_ngram: int,
    text: str,
    tokenizer: str | None,
) -> tuple[Tokenizer, dict[str, Addressing]]:
    """The tokenizer, and what is asked about, by what to call it."""
    from torch_engram.addressing import Addressing, CanonicalVocab
    from torch_engram.config import EngramConfig
    from torch_engram.data import load_tokenizer, open_corpus, train_bpe
    from torch_engram.train import open_checkpoint

    if checkpoint is not None:
        if tokenizer is not None:
            raise ValueError("A checkpoint brings its own tokenizer: leave out --tokenizer.")
        loaded = open_checkpoint(checkpoint)
        if not loaded.banks:
            raise ValueError(f"The model in {checkpoint} has no memory: give a checkpoint trained with one.")
        return loaded.tokenizer, {name: bank.addressing for name, bank in loaded.banks.items()}
    if preset is not None:
        if tokenizer is None:
            raise ValueError("A text needs the tokenizer that the preset is for: give --tokenizer.")
        config, reader = EngramConfig.preset(preset), load_tokenizer(tokenizer)
        return reader, {preset: _of_preset(config, reader)}
    reader = load_tokenizer(tokenizer) if tokenizer is not None else train_bpe(open_corpus(text), _VOCAB_SIZE)
    vocab = CanonicalVocab.build(reader)
    shape: dict[str, Any] = dict(layers=(0,), hidden=1, vocab_size=vocab.size, max_ngram=max_ngram, heads=heads)
    return reader, {f"{size:,} rows": Addressing(EngramConfig(**shape, rows_per_head=size), vocab) for size in rows}


def _of_preset(config: EngramConfig, reader: Tokenizer) -> Addressing:
    from torch_engram.addressing import Addressing, CanonicalVocab
    from torch_engram.cli.trace import require_fit

    if config.scheme == "engram":
        return Addressing(config, CanonicalVocab.of(reader))
    require_fit(reader.get_vocab_size(), config)
    return Addressing(config)


def _read(text: str, reader: Tokenizer, tokens: int | None) -> tuple[Ints, Ints]:
    """The first tokens of a text, and where its documents start among them."""
    from tempfile import TemporaryDirectory

    import numpy as np

    from torch_engram.data import open_corpus, tokenize_corpus

    with TemporaryDirectory() as folder:
        file = tokenize_corpus(open_corpus(text), reader, folder, validation_share=0.0).train
        ids = np.array(file.tokens[:tokens])
        return ids, np.array(file.starts[file.starts < len(ids)])


def _collisions(addressings: Mapping[str, Addressing], ids: Ints, starts: Ints) -> dict[str, list[Collisions]]:
    """The collisions in each memory; the n-grams are counted once for all that see the same ones."""
    from torch_engram.analysis import distinct_ngrams, table_collisions

    known: dict[tuple[object, ...], list[DistinctNgrams]] = {}
    found = {}
    for name, addressing in addressings.items():
        view = (addressing.config.scheme, addressing.config.max_ngram, addressing.pad)
        if view not in known:
            known[view] = distinct_ngrams(addressing, ids, starts)
        found[name] = table_collisions(addressing, known[view])
    return found


def _collisions_json(found: Mapping[str, list[Collisions]], text: str, tokens: int) -> str:
    import json
    from dataclasses import asdict

    tables = [{"memory": name, **asdict(one)} for name, several in found.items() for one in several]
    return json.dumps({"text": text, "tokens": tokens, "tables": tables}, ensure_ascii=False)


def _print_collisions(found: Mapping[str, list[Collisions]], text: str, tokens: int) -> None:
    from rich.console import Console

    from torch_engram.cli.tables import print_whole

    console = Console(highlight=False)
    console.print(f"{text}, {tokens:,} tokens\n", soft_wrap=True, markup=False)
    print_whole(console, _collision_table(found))
    console.print(
        "\nCollided: distinct n-grams that share their row with another one, and the positions of the text where they "
        "are; a uniform random hash expects the same of both. In all: those that collide in every head. Dominance: "
        "positions whose n-gram is the most frequent one of its row. All but n-grams and in all are means over heads.",
        soft_wrap=True,
        style="dim",
    )


def _collision_table(found: Mapping[str, list[Collisions]]) -> Table:
    from rich.table import Table

    from torch_engram.analysis.page import percent

    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("memory")
    for name in (
        "layer", "order", "heads", "rows/head", "n-grams", "n-grams/row", "collided", "expected", "positions", "in all",
        "expected", "positions", "rows used", "expected", "dominance",
    ):  # fmt: skip
        shown.add_column(name, justify="right")
    for memory, several in found.items():
        for one in several:
            rows = _mean(one, "rows")
            heads = ("collided", "expected_collided", "collided_positions")
            every = (one.in_every_head, one.expected_in_every_head, one.in_every_head_positions)
            used = [_mean(one, name) / rows for name in ("occupied", "expected_occupied")]
            shares = [*(_mean(one, name) for name in heads), *every, *used, _mean(one, "dominance")]
            counts = (str(one.layer), str(one.order), str(len(one.heads)), f"{rows:,.0f}", f"{one.ngrams:,}")
            shown.add_row(memory, *counts, f"{one.ngrams / rows:.3g}", *map(percent, shares))
    return shown


def _mean(one: Collisions, name: str) -> float:
    """Of a number that every head has."""
    return sum(float(getattr(head, name)) for head in one.heads) / len(one.heads)


def usage(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    text: Annotated[
        str | None, typer.Option(help="Also count the n-grams of this file or folder of text that share a row.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """Show how often training updated the rows of each table, and how many n-grams of a text share one.

    For example: engram analyze usage runs/tiny --text demo
    """
    import json
    from dataclasses import asdict

    from torch_engram.analysis import table_usage
    from torch_engram.train import open_checkpoint

    loaded = open_checkpoint(checkpoint)
    if not loaded.banks:
        raise ValueError(f"The model in {checkpoint} has no memory: give a checkpoint trained with one.")
    used = [one for bank in loaded.banks.values() for one in table_usage(bank)]
    addressings = {name: bank.addressing for name, bank in loaded.banks.items()}
    sharing = None if text is None else _sharing(addressings, *_read(text, loaded.tokenizer, None))
    if as_json:
        shared = None if sharing is None else [{**asdict(one), "mean": one.mean} for one in sharing]
        typer.echo(json.dumps({"tables": [asdict(one) for one in used], "sharing": shared}, ensure_ascii=False))
    else:
        _print_usage(used, sharing)


def _sharing(addressings: Mapping[str, Addressing], ids: Ints, starts: Ints) -> list[Sharing]:
    import torch

    from torch_engram.analysis import ngram_sharing
    from torch_engram.data import Batch

    tokens = torch.from_numpy(ids.astype("int64"))[None]
    doc_start = torch.zeros_like(tokens, dtype=torch.bool)
    doc_start[0, torch.from_numpy(starts)] = True
    batch = Batch(tokens, tokens, doc_start)  # the targets play no part
    return [one for name, own in addressings.items() for one in ngram_sharing(own, [batch], memory=name)]


def _print_usage(used: Sequence[TableUsage], sharing: Sequence[Sharing] | None) -> None:
    from rich.console import Console

    from torch_engram.analysis.page import percent
    from torch_engram.cli.tables import print_whole

    console = Console(highlight=False)
    for one in used:
        orders = f"order{'s' if len(one.orders) > 1 else ''} {', '.join(map(str, one.orders))}"
        console.print(
            f"{one.memory}, layer {one.layer}, {orders}: {one.updated:,} of {one.rows:,} rows updated "
            f"({percent(one.updated / one.rows)})",
            soft_wrap=True,
            markup=False,
        )
        print_whole(console, _usage_table(one))
        console.print()
    if sharing is not None:
        print_whole(console, _sharing_table(sharing))


def _usage_table(used: TableUsage) -> Table:
    from rich.table import Table

    from torch_engram.analysis.page import percent
    from torch_engram.analysis.usage import bin_label

    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("updates", "rows", "share"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    for number, rows in enumerate(used.histogram):
        bar = "█" * round(40 * rows / max(used.histogram))
        shown.add_row(bin_label(number), f"{rows:,}", percent(rows / used.rows), bar)
    return shown


def _sharing_table(sharing: Sequence[Sharing]) -> Table:
    from rich.table import Table

    from torch_engram.analysis.page import percent

    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("memory")
    for name in ("layer", "order", "n-grams", "heads", "rows", "rows reached", "n-grams a row, mean", "most"):
        shown.add_column(name, justify="right")
    for one in sharing:
        numbers = (one.layer, one.order, f"{one.ngrams:,}", one.heads, f"{one.rows:,}")
        shown.add_row(
            one.memory, *map(str, numbers), percent(one.reached / one.rows), f"{one.mean:.2f}", f"{one.largest:,}"
        )
    return shown
