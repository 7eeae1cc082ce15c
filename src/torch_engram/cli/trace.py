"""``engram trace``: which rows every token reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch_engram.addressing import Addressing
    from torch_engram.analysis import Trace
    from torch_engram.config import EngramConfig


def trace(
    preset: Annotated[str | None, typer.Option(help="A published configuration, such as deepseek-v4.1.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A run's folder, or one of its checkpoints.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="With --preset and --text: a tokenizer.json.")] = None,
    text: Annotated[str | None, typer.Option(help="A text, read as a document of its own.")] = None,
    canonical_ids: Annotated[
        str | None, typer.Option(metavar="IDS", help="Canonical ids (raw ids for qwen-ple), such as 10,20,30,40.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Only this layer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs, with the rows in column order.")] = False,
) -> None:
    """Show every token's raw id, canonical id and rows, and for a checkpoint its gates.

    Rows are numbered within their layer: the head's offset is added. Columns run order by order, then head by head.
    In JSON, "rows" and "gates" are lists by layer; for a model with several memories, by memory and then by layer.
    """
    import json

    if (preset is None) == (checkpoint is None):
        raise ValueError("Say where the rows are: give either --preset or --checkpoint.")
    if (text is None) == (canonical_ids is None):
        raise ValueError("Say what to trace: give either --text or --canonical-ids.")
    ids = _parse(canonical_ids) if canonical_ids is not None else None
    if preset is not None:
        found, configs = _trace_preset(preset, tokenizer, text, ids, layer)
    else:
        assert checkpoint is not None
        if tokenizer is not None:
            raise ValueError("A checkpoint brings its own tokenizer: leave out --tokenizer.")
        found, configs = _trace_checkpoint(checkpoint, text, ids, layer)
    if as_json:
        typer.echo(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        typer.echo("\n".join(_lines(found, configs)))


def _parse(ids: str) -> list[int]:
    try:
        found = [int(part) for part in ids.split(",")]
        if max(map(abs, found)) < 2**63:
            return found
        raise ValueError
    except ValueError:
        raise ValueError(f"--canonical-ids is {ids!r}: give whole numbers with commas, such as 10,20,30,40.") from None


def _trace_preset(
    preset: str, tokenizer: str | None, text: str | None, ids: list[int] | None, layer: int | None
) -> tuple[Trace, dict[str, EngramConfig]]:
    from torch_engram.addressing import Addressing, CanonicalVocab
    from torch_engram.analysis import over_canonical, trace_canonical, trace_ids
    from torch_engram.config import EngramConfig
    from torch_engram.data import load_tokenizer

    config = EngramConfig.preset(preset)
    configs = {preset: config}
    canonical = config.scheme == "engram"
    if ids is not None and canonical:
        return trace_canonical({preset: over_canonical(config)}, ids, layer=layer), configs
    if text is not None and tokenizer is None:
        raise ValueError("--text needs the tokenizer that the preset is for: give --tokenizer, or --canonical-ids.")
    reader = load_tokenizer(tokenizer) if tokenizer is not None else None
    vocab = CanonicalVocab.of(reader) if canonical else None
    if text is not None:
        assert reader is not None
        if not canonical:
            require_fit(reader.get_vocab_size(), config)
        ids = reader.encode(text, add_special_tokens=False).ids
    assert ids is not None
    return trace_ids({preset: Addressing(config, vocab)}, ids, tokenizer=reader, layer=layer), configs


def require_fit(size: int, config: EngramConfig) -> None:
    """Without a canonical map, a preset can tell another model's tokenizer by its number of ids alone."""
    if not 0.95 * config.vocab_size <= size <= config.vocab_size:
        raise ValueError(
            f"This tokenizer has {size} ids and the preset hashes {config.vocab_size}: give the tokenizer of its model."
        )


def _trace_checkpoint(
    checkpoint: Path, text: str | None, ids: list[int] | None, layer: int | None
) -> tuple[Trace, dict[str, EngramConfig]]:
    import dataclasses

    from torch_engram.analysis import over_canonical, read_gates, trace_canonical, trace_ids
    from torch_engram.train import open_checkpoint

    loaded = open_checkpoint(checkpoint)
    if not loaded.banks:
        raise ValueError(f"The model in {checkpoint} has no memory to trace: give a checkpoint trained with one.")
    configs = {name: bank.config for name, bank in loaded.banks.items()}
    addressings: dict[str, Addressing] = {name: bank.addressing for name, bank in loaded.banks.items()}
    if ids is not None:
        schemes = {config.scheme for config in configs.values()}
        if len(schemes) > 1:
            raise ValueError(f"The memories in {checkpoint} hash different kinds of ids: give --text instead.")
        if schemes == {"engram"}:
            over = {
                name: over_canonical(own.config, pad=own.pad, layouts=own.layouts) for name, own in addressings.items()
            }
            return trace_canonical(over, ids, layer=layer), configs
    else:
        assert text is not None
        ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
    found = trace_ids(addressings, ids, tokenizer=loaded.tokenizer, layer=layer)
    gates = read_gates(loaded.decoder, loaded.banks, ids)
    return dataclasses.replace(found, gates={place: gates[place] for place in found.rows}), configs


def _lines(found: Trace, configs: dict[str, EngramConfig]) -> list[str]:
    """A trace for people: a line for each token, and under it one for each layer and order."""
    import json

    lines = []
    for position in range(len(found)):
        head = [f"{position:>4}"]
        if found.texts is not None:
            head.append(json.dumps(found.texts[position], ensure_ascii=False))
        if found.raw_ids is not None:
            head.append(f"raw {found.raw_ids[position]}")
        if found.canonical_ids is not None:
            head.append(f"canonical {found.canonical_ids[position]}")
        lines.append("  ".join(head))
        for (name, layer), rows in found.rows.items():
            config, column = configs[name], 0
            gate = found.gates[name, layer][position].tolist() if found.gates is not None else None
            shown = f"  gate {', '.join(f'{value:.3f}' for value in gate)}" if gate is not None else ""
            lines.append(f"      {name}, layer {layer}{shown}")
            for order, heads in zip(config.orders, config.per_order("heads"), strict=True):
                own = " ".join(f"{row:>10}" for row in rows[position, column : column + heads].tolist())
                lines.append(f"        order {order}, heads 0-{heads - 1}: {own}")
                column += heads
    return lines
