"""``engram table export``: a trained memory as a production format's checkpoint has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch_engram.fusion import Engram
    from torch_engram.memory.read_through import ReadThrough
    from torch_engram.train.checkpoint import Network

_FORMATS = ("deepseek-v4.1", "qwen-ple")


def export(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A run, one of its checkpoints, or a saved memory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder; it appears when it is whole.")],
    layout: Annotated[str, typer.Option("--format", help="deepseek-v4.1 or qwen-ple: whose names and types.")],
    memory: Annotated[str | None, typer.Option(help="The memory's name, where a run has several.")] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A deepseek-v4.1 checkpoint whose other keys come along.")
    ] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Files a table, for qwen-ple; one by default.")] = None,
) -> None:
    """Write a trained memory under the names of DeepSeek-V4.1 or Qwen4Exp, so that what loads theirs loads it.

    Of a run, the Engrams' weights are written, too, and the tokenizer; of a saved memory its tables. When it is
    stopped, the same command goes on where it was.
    For example: engram table export runs/tiny out --format deepseek-v4.1
    """
    from rich.console import Console
    from rich.filesize import decimal

    from torch_engram.cli.progress import amount_bar
    from torch_engram.memory.read_through import ReadThrough
    from torch_engram.memory.saved import is_memory

    _require_options(layout, like, shards)
    try:
        from torch_engram.hub import write_deepseek, write_ple
    except ImportError as error:
        raise ValueError(str(error)) from error
    tokenizer, engrams, folder = None, None, source
    if not is_memory(source):
        from torch_engram.train.checkpoint import memory_folder, open_network

        network = open_network(source)
        name = _name(network, memory)
        tokenizer, engrams, folder = network.tokenizer, _engrams(network, name), memory_folder(network.folder, name)
    elif memory is not None:
        raise ValueError(f"{source} is one memory: leave out --memory.")
    console = Console(highlight=False)
    with amount_bar(console, _nbytes(ReadThrough.of(folder), layout)) as tell:
        if layout == "deepseek-v4.1":
            write_deepseek(folder, out, engrams, like=like, tokenizer=tokenizer, tell=tell)
        else:
            write_ple(folder, out, engrams, shards=shards, tell=tell)
    files = [file for file in out.iterdir() if file.suffix == ".safetensors"]
    size = decimal(sum(file.stat().st_size for file in files))
    console.print(
        f"Wrote {out}: {size} in {len(files):,} file{'s' if len(files) > 1 else ''}.", soft_wrap=True, markup=False
    )


def _require_options(layout: str, like: Path | None, shards: int | None) -> None:
    from torch_engram.config import nearest

    if layout not in _FORMATS:
        raise ValueError(f"There is no format {layout!r}: {nearest(layout, _FORMATS)}")
    if layout == "deepseek-v4.1" and shards is not None:
        raise ValueError("deepseek-v4.1 has one tensor a table: leave out --shards.")
    if layout == "qwen-ple" and like is not None:
        raise ValueError("--like is for deepseek-v4.1: leave it out.")


def _name(network: Network, asked: str | None) -> str:
    """Of the memory that is meant."""
    names = network.facts["banks"]
    if asked is None and len(names) == 1:
        return str(names[0])
    if asked not in names:
        has = ", ".join(map(repr, names)) or "none"
        raise ValueError(f"{network.folder} has the memories {has}: say which by --memory.")
    return str(asked)


def _engrams(network: Network, name: str) -> dict[int, Engram]:
    """The memory's Engram in each of its layers."""
    from torch_engram.models.block import Block

    blocks = {layer: block for layer, block in enumerate(network.decoder.blocks) if isinstance(block, Block)}
    return {layer: block.engrams[name] for layer, block in blocks.items() if name in block.engrams}  # type: ignore[misc]


def _nbytes(memory: ReadThrough, layout: str) -> int:
    """Of the tables' rows as they will be."""
    from torch_engram.stores.codecs import CODECS

    total = 0
    for table in memory.tables:
        codec = "fp8" if layout == "deepseek-v4.1" else table.codec
        total += table.rows * sum(part.nbytes for part in CODECS[codec].components(table.width))
    return total
