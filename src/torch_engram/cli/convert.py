"""``engram table convert``: a table's files in other shards, another layout or another codec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch_engram.stores.row_sources import RowSource


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A .safetensors file, a folder of shards, or a saved memory.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder; it appears when it is whole.")],
    layout: Annotated[
        str | None, typer.Option(help="plain, deepseek-v4.1 or qwen4exp; by default the source's.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, fp8 or int8; by default the source's, if the layout has it.")
    ] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Files; one by default.")] = None,
    shard_size: Annotated[str | None, typer.Option(metavar="SIZE", help="The most of a file, as 4GB.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="The layer of a table whose files say none.")] = None,
) -> None:
    """Write tables anew: in other shards, another layout or another codec, in one pass over the disk.

    The same codec keeps every byte. When it is stopped, the same command goes on where it was.
    For example: engram table convert shards/ table --codec fp8 --shard-size 4GB
    """
    from rich.console import Console
    from rich.filesize import decimal

    from torch_engram.cli.progress import amount_bar
    from torch_engram.sizes import parse_size
    from torch_engram.stores.convert import Conversion
    from torch_engram.stores.shards import Target

    tables = _tables(source)
    target = Target(layout, codec, shards, None if shard_size is None else parse_size(shard_size), layer)
    conversion = Conversion(source, tables, out, target)
    console = Console(highlight=False)
    with amount_bar(console, conversion.nbytes) as tell:
        kept = conversion.run(tell)
    files = len(conversion.shards)
    earlier = f", {decimal(kept)} of them in an earlier run" if kept else ""
    console.print(
        f"Wrote {out}: {decimal(conversion.nbytes)} in {files:,} file{'s' if files > 1 else ''}{earlier}.",
        soft_wrap=True,
        markup=False,
    )


def _tables(source: Path) -> list[RowSource]:
    from torch_engram.memory.saved import is_memory
    from torch_engram.memory.saved_rows import saved_rows
    from torch_engram.stores.row_sources import named_rows

    return [*saved_rows(source)] if is_memory(source) else [*named_rows(source)]
