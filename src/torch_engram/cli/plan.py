"""``engram plan``: where a memory's tables fit, and what a lookup then moves and takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from torch_engram.analysis.machine import Machine
    from torch_engram.analysis.placement import Demand, Placement, Tables
    from torch_engram.config import EngramConfig

_MEASURED = "as measured on an H100 with PCIe 5 x16"


def plan(
    preset: Annotated[str, typer.Option(help="A published configuration, such as deepseek-v4.1.")],
    text: Annotated[
        str | None, typer.Option(help="A file or folder of text like that to be served; by default a known curve.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="With --text: a tokenizer.json.")] = None,
    codec: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, fp8 or int8; by default fp8 for deepseek-v4.1, else bf16.")
    ] = None,
    cache: Annotated[str, typer.Option(metavar="SIZE", help="A cache before host or disk; 0 for none.")] = "8GB",
    hbm: Annotated[
        str | None, typer.Option(metavar="SIZE", help="GPU memory, such as 80GB; by default what is free here.")
    ] = None,
    ram: Annotated[str | None, typer.Option(metavar="SIZE", help="Host memory; by default what is free here.")] = None,
    disk: Annotated[str | None, typer.Option(metavar="SIZE", help="Disk; by default what is free here.")] = None,
    bus: Annotated[float | None, typer.Option(help="GB/s of copies to the GPU.")] = None,
    host_gather: Annotated[float | None, typer.Option(help="GB/s of rows that the CPU gathers.")] = None,
    device_gather: Annotated[float | None, typer.Option(help="GB/s of rows that the GPU gathers.")] = None,
    disk_iops: Annotated[float | None, typer.Option(help="Random 4 KiB reads a second, many at a time.")] = None,
    disk_latency: Annotated[float | None, typer.Option(help="Microseconds of one such read alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs, with every input.")] = False,
) -> None:
    """Tell which placement fits this machine, or one that the options describe, and predict what lookups cost there.

    For example: engram plan --preset deepseek-v4.1 --hbm 80GB --ram 256GB --disk 2TB
    """
    import json

    from torch_engram.analysis.placement import Tables, placements
    from torch_engram.analysis.placement import as_json as placement_json
    from torch_engram.config import EngramConfig
    from torch_engram.sizes import parse_size
    from torch_engram.stores.codecs import require_value_codec

    if (text is None) != (tokenizer is None):
        raise ValueError("Hit rates on a text need both: give --text and --tokenizer, or neither.")
    config = EngramConfig.preset(preset)
    codec = codec or ("fp8" if preset == "deepseek-v4.1" else "bf16")
    require_value_codec(codec)
    tables, cache_bytes = Tables(config, codec), parse_size(cache)
    rates = {"bus": bus, "host_gather": host_gather, "device_gather": device_gather, "disk_iops": disk_iops}
    machine, origins = _machine({"hbm": hbm, "ram": ram, "disk": disk}, {**rates, "disk_latency": disk_latency})
    demands, source = _demands(tables, cache_bytes, text, tokenizer)
    found = placements(tables, cache_bytes, machine, demands)
    if as_json:
        inputs = {"preset": preset, "codec": codec, "record_bytes": tables.records, "table_bytes": tables.nbytes}
        inputs |= {"cache_bytes": cache_bytes, "text": source, "machine": vars(machine), "origins": origins}
        per_token = {way: {**vars(demand), "hit_rates": demand.hit_rates} for way, demand in demands.items()}
        shown = {"inputs": inputs, "ngrams_a_token": per_token, "placements": [placement_json(one) for one in found]}
        typer.echo(json.dumps(shown, ensure_ascii=False))
    else:
        _print(preset, tables, cache_bytes, machine, origins, demands, source, found)


def _machine(sizes: Mapping[str, str | None], rates: Mapping[str, float | None]) -> tuple[Machine, dict[str, str]]:
    """The machine, and where each of its numbers is from. Rates are in GB/s, reads a second and microseconds."""
    from torch_engram.analysis.machine import Machine, free_disk, free_hbm, free_ram
    from torch_engram.sizes import parse_size

    here = {"hbm": free_hbm, "ram": free_ram, "disk": lambda: free_disk(Path())}
    numbers: dict[str, Any] = {
        name: parse_size(size) if size is not None else here[name]() for name, size in sizes.items()
    }
    scale = {"disk_iops": 1.0, "disk_latency": 1e-6}
    numbers |= {name: rate * scale.get(name, 1e9) for name, rate in rates.items() if rate is not None}
    origins = {name: "free here" if size is None else "given" for name, size in sizes.items()}
    origins |= {name: _MEASURED if rate is None else "given" for name, rate in rates.items()}
    return Machine(**numbers), origins


def _demands(tables: Tables, cache: int, text: str | None, tokenizer: str | None) -> tuple[dict[str, Demand], str]:
    from torch_engram.analysis.placement import demands_of_text, demands_shipped

    if text is None:
        return demands_shipped(tables, cache)
    from rich.console import Console

    assert tokenizer is not None
    with Console(stderr=True).status("Reading the text") as status:
        ngrams = _read(tables.config, text, tokenizer)
        status.update("Counting what is asked for again")
        found = demands_of_text(ngrams, tables, cache)
    return found, f"{text}, {ngrams.ids.shape[1]:,} tokens, half of them to warm the cache"


def _read(config: EngramConfig, text: str, tokenizer: str) -> Any:
    from tempfile import TemporaryDirectory

    from torch_engram.addressing import Addressing, CanonicalVocab
    from torch_engram.analysis.hit_rates import ngrams_of_file
    from torch_engram.cli.trace import require_fit
    from torch_engram.data import load_tokenizer, open_corpus, tokenize_corpus

    reader, corpus = load_tokenizer(tokenizer), open_corpus(text)
    if config.scheme == "qwen_ple":
        require_fit(reader.get_vocab_size(), config)
    addressing = Addressing(config, CanonicalVocab.of(reader) if config.scheme == "engram" else None)
    with TemporaryDirectory() as folder:
        return ngrams_of_file(addressing, tokenize_corpus(corpus, reader, folder, validation_share=0.0).train)


def _print(
    preset: str, tables: Tables, cache: int, machine: Machine, origins: Mapping[str, str],
    demands: Mapping[str, Demand], source: str, found: Sequence[Placement],
) -> None:  # fmt: skip
    from rich.console import Console

    from torch_engram.analysis.placement import gigabytes

    console = Console(highlight=False)
    sizes = " / ".join(str(size) for size in dict.fromkeys(tables.records))
    console.print(
        f"{preset} in {tables.codec}: tables of {gigabytes(tables.nbytes)}; a token reads {sum(tables.rows)} rows of "
        f"{sizes} bytes, {sum(tables.entries):,} bytes.",
        soft_wrap=True,
    )
    console.print(_demand_table(tables, demands))
    console.print(f"Cache: {gigabytes(cache)}. Text: {source}.\n", soft_wrap=True, markup=False)
    console.print(_cost_table(found))
    for one in found:
        console.print(f"{one.name} {'fits' if one.fits else 'does not fit'}: {one.why}.", soft_wrap=True)
    best = next((one.name for one in found if one.fits), None)
    console.print(
        f"Place the tables on the {best}: of the placements that fit it comes first.\n" if best else
        "No placement fits: use a smaller --cache, another --codec, or a larger machine.\n",
        soft_wrap=True,
    )  # fmt: skip
    for line in _assumptions(machine, origins):
        console.print(line, soft_wrap=True, style="dim")


def _demand_table(tables: Tables, demands: Mapping[str, Demand]) -> Table:
    from rich.table import Table

    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("n-grams a token", "order", "asked for", "in the cache", "fetched"):
        shown.add_column(name, justify="left" if name == "n-grams a token" else "right")
    for way, demand in demands.items():
        rows = zip(tables.config.orders, demand.asked, demand.hit_rates, demand.fetched, strict=True)
        for place, (order, asked, rate, fetched) in enumerate(rows):
            shown.add_row("" if place else way, str(order), f"{asked:.3f}", f"{100 * rate:.1f} %", f"{fetched:.3f}")
    return shown


def _cost_table(found: Sequence[Placement]) -> Table:
    from rich.table import Table

    from torch_engram.analysis.charts import number

    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("placement", "", "bus, bytes/token", "disk, bytes/token", "µs/token", "µs/step"):
        shown.add_column(name, justify="left" if name in ("placement", "") else "right")
    for one in found:
        for place, (way, cost) in enumerate(one.costs.items()):
            moved = f"{cost.bus_bytes:,.0f}", f"{cost.disk_bytes:,.0f}"
            shown.add_row("" if place else one.name, way, *moved, number(cost.token_us), number(cost.step_us))
    return shown


def _assumptions(machine: Machine, origins: Mapping[str, str]) -> list[str]:
    """Every number of the machine by where it is from, and what the arithmetic leaves out."""
    from torch_engram.analysis.placement import gigabytes

    names = {"hbm": "GPU memory", "ram": "RAM", "disk_iops": "disk reads", "disk_latency": "one disk read"}
    shown = {name: gigabytes(getattr(machine, name)) for name in ("hbm", "ram", "disk")}
    shown |= {name: f"{getattr(machine, name) / 1e9:,.4g} GB/s" for name in ("bus", "host_gather", "device_gather")}
    shown |= {"disk_iops": f"{machine.disk_iops:,.0f}/s", "disk_latency": f"{1e6 * machine.disk_latency:,.4g} µs"}
    lines = []
    for origin in dict.fromkeys(origins.values()):
        own = [f"{names.get(name, name.replace('_', ' '))} {shown[name]}" for name in shown if origins[name] == origin]
        lines.append(f"{origin[0].upper()}{origin[1:]}: {', '.join(own)}.")
    return [
        *lines,
        "One LRU cache of all orders and layers, by n-gram, its keys not counted. A row costs the disk a read of 4 KiB "
        "for each tensor that it lies in; the page cache is not counted. Nothing overlaps; launches, waits and the "
        "memory that the model takes are not counted. docs/guide.md has the formulas.",
    ]
