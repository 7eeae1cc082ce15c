"""``engram bench lookup``: how fast rows come from disk, host or device here, and what this machine could do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torch_engram.cli.bench import Out, text_table
from torch_engram.cli.tables import print_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from rich.console import Console

    from torch_engram.bench.lookup_stand import LookupStand
    from torch_engram.bench.lookups import LookupTimes
    from torch_engram.config import EngramConfig
    from torch_engram.stores.named_tables import NamedTable


TablesAt = Annotated[Path | None, typer.Option(help="Files of a table; without them, tables of random rows are made.")]
Rows = Annotated[
    int | None,
    typer.Option(min=1, max=1 << 40, help="Rows a layer to make; by default 2 GB in all, if there is room."),
]
Codec = Annotated[
    str | None, typer.Option(help="fp32, bf16, fp16, fp8 or int8, of rows to make; by default the preset's.")
]
Keep = Annotated[
    Path | None, typer.Option(help="Make the tables here and leave them, for --tables; else beside --out and not.")
]
Preset = Annotated[str, typer.Option(help="Whose columns and scheme; scaled to the rows there are.")]
Layers = Annotated[
    list[int] | None, typer.Option("--layers", metavar="LAYER", help="A layer; repeatable. By default all.")
]
Placements = Annotated[
    list[str] | None,
    typer.Option("--placement", metavar="NAME", help="disk, disk-direct, host or device; repeatable. By default all."),
]
TextAt = Annotated[str, typer.Option(help="A text file, a folder or the name of a dataset.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="A tokenizer.json, its folder or a model's name; by default trained on the text.")
]
TextCache = Annotated[Path, typer.Option(help="Where the tokenised text is kept.")]
Cache = Annotated[
    str | None, typer.Option(metavar="SIZE", help="A cache in front of all but device, such as 8GB; by default none.")
]
Warm = Annotated[
    int, typer.Option(min=0, help="Tokens that fill the cache first, of the text before that which is timed.")
]
Chunk = Annotated[int, typer.Option(min=2, help="Tokens of a prefill read.")]
Chunks = Annotated[int, typer.Option(min=0, help="Prefill reads that are timed.")]
Sequences = Annotated[
    list[int] | None, typer.Option(min=1, help="Sequences of a decode read; repeatable. By default 1 and 512.")
]
Steps = Annotated[int, typer.Option(min=0, help="Decode reads that are timed, for each number of sequences.")]
Cold = Annotated[bool, typer.Option("--cold", help="Drop what memory keeps of the files before every read.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; by default cuda where there is one.")]


def lookup(
    tables: TablesAt = None, rows: Rows = None, codec: Codec = None, keep: Keep = None,
    preset: Preset = "deepseek-v4.1", layers: Layers = None, placements: Placements = None,
    text: TextAt = "demo", tokenizer: Tokenizer = None, text_cache: TextCache = Path("runs/cache"),
    cache: Cache = None, warm: Warm = 250_000, chunk: Chunk = 8192, chunks: Chunks = 12, sequences: Sequences = None,
    steps: Steps = 200, cold: Cold = False, device: Device = None, out: Out = Path("engram-bench"),
) -> None:  # fmt: skip
    """Read a table's rows for natural text, prefill and decode: times and rates, against limits of this machine.

    For example: engram bench lookup --tables shards/ --placement disk --placement host --text my_text.txt --cold
    """
    import tempfile

    from rich.console import Console

    from torch_engram.bench.excerpts import Excerpts, modes
    from torch_engram.bench.lookup_stand import LookupStand, choose_placements, config_for, read_text
    from torch_engram.bench.lookups import require_cold
    from torch_engram.bench.results import require_writable

    on = _device(device)
    if tables is not None and (rows or codec or keep):
        raise ValueError("--rows, --codec and --keep are of tables to make: leave them out, or leave out --tables.")
    if cold:
        require_cold()
    wanted = modes(chunk, chunks, sequences or [1, 512], steps)
    if not wanted:
        raise ValueError("With --chunks 0 and --steps 0 nothing is read: leave out one of them.")
    chosen = choose_placements(placements or [], on.type)
    budget = _cache_bytes(cache, chosen)
    require_writable(out)  # now, and not after all was timed
    there = next(path for path in out.absolute().parents if path.exists())  # /tmp may be memory
    console = Console()
    with (
        console.status("Reading the text") as status,
        tempfile.TemporaryDirectory(prefix="engram-tables-", dir=there) as beside,
    ):
        content = read_text(text, tokenizer, text_cache)
        excerpts = Excerpts(content.files.train, wanted, warm if budget else 0)
        config = config_for(preset, content, layers or [])
        status.update("Opening the tables" if tables else "Making tables of random rows")
        found = _tables(tables, keep or Path(beside), config, layers or [], rows, codec)
        status.update("Measuring what this machine could do")
        stand = LookupStand(found, config, content.vocab, on, cold, budget)
        timed = []
        for placement in chosen:
            fills = budget is not None and placement != "device"
            status.update(f"{'Filling a cache, then timing' if fills else 'Timing'} {placement}")
            timed += stand.time(placement, wanted, excerpts)
    _report(console, out, stand, timed, excerpts.warm, text)


def _device(name: str | None) -> torch.device:
    import torch

    from torch_engram.train.build import require_device

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(name)
    return torch.device(name)


def _cache_bytes(cache: str | None, placements: Sequence[str]) -> int | None:
    from torch_engram.sizes import parse_size

    if cache is not None and placements == ["device"]:
        raise ValueError("--cache stands in front of other placements than device: leave it out, or name another.")
    return None if cache is None else parse_size(cache)


def _tables(
    given: Path | None, folder: Path, config: EngramConfig, layers: Sequence[int], rows: int | None, codec: str | None
) -> dict[int, NamedTable]:
    """By layer: those that are given, or made in ``folder``."""
    from torch_engram.bench.lookup_tables import choose_layers, synthesise_layers, tables_at

    if given is None:
        return synthesise_layers(folder, config, rows, codec)
    return choose_layers(tables_at(given, config.layers[0]), layers)


def _report(
    console: Console, out: Path, stand: LookupStand, timed: Sequence[LookupTimes], warmed: int, text: str
) -> None:
    described, notes = stand.describe(warmed), stand.notes(warmed)
    _show(console, stand, timed, [f"Microseconds a read. {described}.", *notes])
    _write(out, stand, timed, f"{described} text={text}", notes)
    console.print(f"Wrote {out / 'lookup.csv'} and {out / 'lookup.html'}.", soft_wrap=True)


def _show(console: Console, stand: LookupStand, timed: Sequence[LookupTimes], notes: Sequence[str]) -> None:
    from torch_engram.bench.page import LOOKUP_HEAD, hit_rows, limit_cells, lookup_cells

    print_whole(console, text_table(
        ["placement", "read", *LOOKUP_HEAD], [[one.placement, one.mode.name, *lookup_cells(one)] for one in timed]
    ))  # fmt: skip
    head, hits = hit_rows(timed)
    if hits:
        print_whole(console, text_table(["placement", "read", *head], hits))
    print_whole(console, text_table(["limit", "rate", "unit", "what it is"], [
        [one.case, *limit_cells(one)] for one in stand.limits.values()
    ]))  # fmt: skip
    for note in notes:
        console.print(note, soft_wrap=True)


def _write(out: Path, stand: LookupStand, timed: Sequence[LookupTimes], settings: str, notes: Sequence[str]) -> None:
    from torch_engram.bench.page import lookup_page
    from torch_engram.bench.results import write_csv
    from torch_engram.durable import replacing

    device = stand.device.type
    rows = [(("limit", "", settings), one) for one in stand.limits.values()]
    rows += [((one.placement, one.mode.name, settings), measured) for one in timed for measured in one.measurements()]
    write_csv(out / "lookup.csv", ("placement", "read", "settings"), rows, device)
    with replacing(out / "lookup.html") as file:
        file.write(lookup_page(timed, list(stand.limits.values()), device, settings, notes).encode())
