"""``engram plan``: where a memory's tables fit, and what a lookup then moves and takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch_engram.analysis.machine import Machine
    from torch_engram.analysis.placement import Demand, Tables
    from torch_engram.config import EngramConfig

_QUOTED = "as measured on an H100 with PCIe 5 x16"
_SCALE = {"disk_iops": 1.0, "disk_latency": 1e-6}
"""Of rates as options give them, which otherwise are in GB/s."""


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
    disk: Annotated[
        bool, typer.Option("--disk", help="There is a disk with room for the tables; by default what is free here.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the rates here, with a table of 1 GB in this folder meanwhile.")
    ] = False,
    bus: Annotated[float | None, typer.Option(help="GB/s of copies to the GPU.")] = None,
    host_gather: Annotated[float | None, typer.Option(help="GB/s of rows that come from host memory.")] = None,
    device_gather: Annotated[float | None, typer.Option(help="GB/s of rows that the GPU gathers.")] = None,
    disk_iops: Annotated[float | None, typer.Option(help="Random 4 KiB reads a second, many at a time.")] = None,
    disk_latency: Annotated[float | None, typer.Option(help="Microseconds of one such read alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs, with every input.")] = False,
) -> None:
    """Tell which placement fits this machine, or one that the options describe, and predict what lookups cost there.

    For example: engram plan --preset deepseek-v4.1 --hbm 80GB --ram 256GB --disk
    """
    import json

    from rich.console import Console

    from torch_engram.analysis.placement import Tables, placements
    from torch_engram.cli.plan_report import PlanReport
    from torch_engram.config import EngramConfig
    from torch_engram.sizes import parse_size
    from torch_engram.stores.codecs import require_value_codec

    if (text is None) != (tokenizer is None):
        raise ValueError("Hit rates on a text need both: give --text and --tokenizer, or neither.")
    codec = codec or ("fp8" if preset == "deepseek-v4.1" else "bf16")
    require_value_codec(codec)
    tables, cache_bytes = Tables(EngramConfig.preset(preset), codec), parse_size(cache)
    rates = {"bus": bus, "host_gather": host_gather, "device_gather": device_gather, "disk_iops": disk_iops}
    machine, origins = _machine(hbm, ram, disk, {**rates, "disk_latency": disk_latency})
    demands, source = _demands(tables, cache_bytes, text, tokenizer)
    if measure:
        machine, origins = _measured(machine, origins, tables)
    found = placements(tables, cache_bytes, machine, demands)
    report = PlanReport(preset, tables, cache_bytes, machine, origins, demands, source, found)
    if as_json:
        typer.echo(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        report.print(Console(highlight=False))


def _machine(
    hbm: str | None, ram: str | None, disk: bool, rates: Mapping[str, float | None]
) -> tuple[Machine, dict[str, str]]:
    """The machine, and where each of its numbers is from."""
    from torch_engram.analysis.machine import Machine, free_disk, free_hbm, free_ram
    from torch_engram.sizes import parse_size

    given = {name: rate * _SCALE.get(name, 1e9) for name, rate in rates.items() if rate is not None}
    machine = Machine(
        free_hbm() if hbm is None else parse_size(hbm),
        free_ram() if ram is None else parse_size(ram),
        None if disk else free_disk(Path()),
        **given,
    )
    here = {"hbm": hbm is None, "ram": ram is None, "disk": not disk}
    origins = {name: "free here" if free else "given" for name, free in here.items()}
    return machine, origins | {name: "given" if name in given else _QUOTED for name in rates}


def _measured(machine: Machine, origins: dict[str, str], tables: Tables) -> tuple[Machine, dict[str, str]]:
    """``machine`` with rates of this one for those that nobody gave; what cannot be measured here stays as it is."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from torch_engram.bench.rates import measured_rates
    from torch_engram.cli.plan_report import MEASURED

    with (
        Console(stderr=True).status("Measuring what this machine can do"),
        TemporaryDirectory(prefix="engram-plan-", dir=Path()) as folder,
    ):
        found = measured_rates(tables.config, tables.codec, Path(folder))
    rates: dict[str, Any] = {name: rate for name, rate in found.items() if origins[name] != "given"}
    return replace(machine, **rates), origins | dict.fromkeys(rates, MEASURED)


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
