"""``engram table``: what a table's files hold, whether they are whole, and other files of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from torch_engram.cli.convert import convert
from torch_engram.cli.export import export
from torch_engram.cli.tables import print_whole

table = typer.Typer(
    name="table",
    help="Look into the files of a table, check them, convert them, or make some.",
    no_args_is_help=True,
)

Where = Annotated[
    Path, typer.Argument(metavar="PATH", help="A .safetensors file, a folder of shards, or a saved memory.")
]


@table.command()
def info(path: Where) -> None:
    """Show every table in the files: rows, width, codec, size, and where it lies.

    DeepSeek-V4.1's and Qwen4Exp's tables are known by name; of other files every matrix of a codec's type is shown.
    Nothing is loaded.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from torch_engram.memory.saved import is_memory

    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("table", "layout", "layer", "rows", "width", "codec", "size", "files"):
        shown.add_column(name, justify="left" if name in ("table", "layout", "codec") else "right", overflow="fold")
    for line in _memory_lines(path) if is_memory(path) else _tensor_lines(path):
        shown.add_row(*map(Text, line))
    print_whole(Console(), shown)


def _memory_lines(folder: Path) -> Iterator[tuple[str, ...]]:
    from torch_engram.memory.saved import SavedMemory, table_folder

    saved = SavedMemory.read(folder)
    for one, manifest in saved.parts():
        files = [folder / table_folder(one.space) / part.file for part in manifest.parts]
        nbytes = sum(file.stat().st_size for file in files)
        also = ", ".join(plane for plane in manifest.planes if not plane.startswith("value"))
        name, codec = f"{saved.facts['name']} ({also})", saved.facts["codec"]
        yield name, "torch-engram", *_cells(one.layer, one.rows, one.dim, codec, nbytes, len(files))


def _tensor_lines(path: Path) -> Iterator[tuple[str, ...]]:
    from torch_engram.stores.named_tables import tables_in

    for one in tables_in(path):
        yield one.name, one.layout, *_cells(one.layer, one.rows, one.width, one.codec, one.nbytes, len(one.files))


def _cells(layer: int | None, rows: int, width: int, codec: str, nbytes: int, files: int) -> tuple[str, ...]:
    from rich.filesize import decimal

    return "" if layer is None else str(layer), f"{rows:,}", str(width), codec, decimal(nbytes), str(files)


@table.command()
def verify(
    path: Where,
    save: Annotated[bool, typer.Option("--save", help="Add what was found to SHA256SUMS beside the files.")] = False,
) -> None:
    """Read every file through and compare it with its checksum: a memory's own, or SHA256SUMS beside the shards.

    Names what is damaged, and ends with exit code 1 then. Headers and shapes are checked, too.
    """
    from rich.console import Console

    from torch_engram.cli.progress import amount_bar
    from torch_engram.memory.saved import is_memory
    from torch_engram.stores.checksums import SUMS, digests, write_sums

    console = Console(highlight=False)
    own = is_memory(path)
    if save and own:
        raise ValueError(f"{path} is a memory and names its own checksums: leave out --save.")
    wanted = _memory_checksums(path) if own else _shard_checksums(path)
    if save and not os.access(next(iter(wanted)).parent, os.W_OK):
        raise ValueError(f"{next(iter(wanted)).parent} takes no {SUMS}: leave out --save, or make it writable.")
    present = [file for file in wanted if file.is_file()]
    with amount_bar(console, sum(file.stat().st_size for file in present)) as tell:
        found = digests(present, tell)
    damaged = []
    for file, checksum in wanted.items():
        verdict = "whole" if checksum == found.get(file) else "read" if checksum is None else "damaged"
        if file not in found:
            verdict = "missing"
        if verdict in ("damaged", "missing"):
            damaged.append(str(file))
        console.print(f"{verdict:<7}  {found.get(file, '-' * 64)}  {file.name}", soft_wrap=True, markup=False)
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(wanted)} files are not whole: fetch {', '.join(damaged)} again.")
    if save:
        console.print(f"Wrote {write_sums(present[0].parent, found)}.", soft_wrap=True)
    elif not all(wanted.values()):
        console.print("Headers and shapes are sound. Without checksums nothing is said of the rows: see --save.")


@table.command()
def synth(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder; it appears when it is whole.")],
    rows: Annotated[int, typer.Option(min=1, max=1 << 40, help="Rows of the table.")],
    layout: Annotated[str, typer.Option(help="plain, deepseek-v4.1 or qwen4exp: what tensors are called.")] = "plain",
    width: Annotated[
        int | None, typer.Option(min=1, max=1 << 20, help="Numbers a row; by default the layout's.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="fp32, bf16, fp16, fp8 or int8; by default the layout's.")] = None,
    layer: Annotated[int, typer.Option(min=0, help="The layer that names say.")] = 1,
    shards: Annotated[int, typer.Option(help="Files, a tensor each; more than one for qwen4exp.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Other numbers.")] = 0,
) -> None:
    """Make a table of random rows, of any size, to try placements and benchmarks on.

    For example: engram table synth table-64gb --layout deepseek-v4.1 --rows 242000000
    """
    from rich.console import Console

    from torch_engram.cli.progress import amount_bar
    from torch_engram.stores.layouts import known_layout
    from torch_engram.stores.synthetic import require_fitting, synthesise

    made = known_layout(layout)
    width, codec = width or made.width, codec or made.codecs[0]
    require_fitting(out, layout, rows, codec, shards)
    console = Console(highlight=False)
    with amount_bar(console, rows, "rows") as tell:
        synthesise(out, layout, rows, width, codec, layer=layer, shards=shards, seed=seed, tell=tell)
    console.print(f"Wrote {out}: {rows:,} rows of {width} numbers in {codec}.", soft_wrap=True)


def _memory_checksums(folder: Path) -> dict[Path, str | None]:
    from torch_engram.memory.saved import SavedMemory

    saved = SavedMemory.read(folder)
    saved.require_sound()
    return dict(saved.checksums())


def _shard_checksums(path: Path) -> dict[Path, str | None]:
    """Of every shard that is there (None without one) or that SHA256SUMS has.

    Raises ``ValueError`` for headers and shapes that are unsound.
    """
    from torch_engram.stores.checksums import read_sums
    from torch_engram.stores.named_tables import find_tables
    from torch_engram.stores.tensor_files import tensors_in

    tensors = tensors_in(path)
    find_tables(tensors)
    files = {place.file for place in tensors.values()}
    sums = read_sums(path if path.is_dir() else path.parent)
    if path.is_dir():
        files |= {path / name for name in sums if name.endswith(".safetensors")}
    return {file: sums.get(file.name) for file in sorted(files)}


table.command()(convert)
table.command()(export)
