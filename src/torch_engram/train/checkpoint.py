"""Checkpoints of a run: folders ``step-00000500`` that are whole or absent, safetensors and JSON only.

- ``checkpoint.json``: step, position in the data, recipe, model, tokenizer digest;
- ``model.safetensors``: the decoder; ``optimizer.safetensors``: its optimisers;
- ``memory-<name>/``: each bank (:mod:`torch_engram.memory.checkpoint`);
- ``tokenizer.json``.

A checkpoint is written under a hidden name, synced and renamed; earlier ones are removed only after that, and under a
hidden name too. What a killed run left under hidden names goes with the next save. Of tables only the rows that
changed since the checkpoint before are written; it shares its other files, which outlive it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from torch_engram.data import load_tokenizer, tokenizer_digest
from torch_engram.durable import file_digest, sync, write_json
from torch_engram.memory import MemoryBank, load_bank, open_bank, save_bank
from torch_engram.models import Decoder, DecoderConfig
from torch_engram.train.ranks import ALONE, Ranks

_FACTS = "checkpoint.json"
_PREFIX = "step-"
_FILES = ("model.safetensors", "optimizer.safetensors", "tokenizer.json")
_MEND = "remove this checkpoint, and the one before it is taken"
_KEYS = ("step", "model", "banks", "tokenizer_digest", "recipe", "data", "seconds")


@dataclass(frozen=True)
class Loaded:
    """A trained model as it was saved."""

    decoder: Decoder
    banks: dict[str, MemoryBank]
    tokenizer: Tokenizer
    facts: dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A trained model without its tables."""

    folder: Path
    """Of the checkpoint."""
    decoder: Decoder
    tokenizer: Tokenizer
    facts: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    decoder: Decoder,
    banks: Mapping[str, MemoryBank],
    optimizers: Sequence[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    facts: Mapping[str, Any],
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Save a run after ``step`` steps as ``folder/step-…`` and remove all but the newest ``keep``.

    A checkpoint of that step which is there already is this one, and stays: a run passes each step once. All ``ranks``
    call it; the files are those of one process.
    Raises ``ValueError`` when it cannot be written (a full disk, say); what was there before is then untouched.
    """
    final = checkpoint_path(folder, step)
    if ranks.agree((final / _FACTS).exists()):
        return final
    partial = _hidden(final)
    try:
        ranks.lead(lambda: _begin(folder, partial))
        since = ranks.agree(latest_checkpoint(folder))
        _write(partial, step, decoder, banks, optimizers, tokenizer, facts, since, ranks)
        ranks.lead(lambda: _finish(folder, partial, final, keep))
    except (OSError, SafetensorError) as error:
        earlier = latest_checkpoint(folder)
        kept = f"; {earlier} is whole" if earlier is not None else ""
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"Cannot save {final} ({reason}): make room, or set another out{kept}.") from error
    finally:
        if ranks.leads:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _begin(folder: Path, partial: Path) -> None:
    for left in folder.glob(_hidden(folder / f"{_PREFIX}*").name):
        shutil.rmtree(left)
    partial.mkdir(parents=True)


def _finish(folder: Path, partial: Path, final: Path, keep: int) -> None:
    os.rename(partial, final)
    sync(folder)
    for old in checkpoints(folder)[:-keep]:
        os.rename(old, _hidden(old))
        shutil.rmtree(_hidden(old))


def _hidden(path: Path) -> Path:
    """Where a checkpoint is while it is written or removed."""
    return path.with_name(f".{path.name}.partial")


def _write(
    partial: Path,
    step: int,
    decoder: Decoder,
    banks: Mapping[str, MemoryBank],
    optimizers: Sequence[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    facts: Mapping[str, Any],
    since: Path | None,
    ranks: Ranks,
) -> None:
    """``since``: an earlier checkpoint, whose rows need not be written again where they are the same."""
    _save_whole(_weights(decoder), partial / "model.safetensors", ranks)
    _save_whole(_optimizer_tensors(optimizers), partial / "optimizer.safetensors", ranks)
    for name, bank in banks.items():
        save_bank(bank, memory_folder(partial, name), since and memory_folder(since, name))

    def vouch() -> None:
        (partial / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        content = {
            "step": step,
            "sha256": {name: file_digest(partial / name) for name in _FILES},
            "model": decoder.config.to_dict(),
            "banks": list(banks),
            "tokenizer_digest": tokenizer_digest(tokenizer),
            **facts,
        }
        write_json(partial / _FACTS, content)
        for path in (*partial.rglob("*"), partial):
            sync(path)

    ranks.lead(vouch)


def resume(
    path: Path,
    decoder: Decoder,
    banks: Mapping[str, MemoryBank],
    optimizers: Sequence[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Load ``path`` into the parts of a run and return its facts. Any number of ranks may have saved it.

    Raises ``ValueError`` naming the part that does not fit or the file that is damaged.
    """
    facts = read_facts(path)
    if facts["tokenizer_digest"] != tokenizer_digest(tokenizer):
        raise ValueError(
            f"{path} was trained with another tokenizer: give the corpus or tokenizer that it was made with."
        )
    if facts["model"] != decoder.config.to_dict():
        raise ValueError(f"{path} holds another model: resume with the recipe and settings that it was made with.")
    _load_weights(decoder, path, ranks)
    _load_optimizers(optimizers, load_file(path / "optimizer.safetensors"), path, ranks)
    for name, bank in banks.items():
        load_bank(bank, memory_folder(path, name))
    return facts


def open_checkpoint(path: Path, device: str = "cpu") -> Loaded:
    """A trained model for reading. ``path``: a checkpoint, or a folder of them, of which the newest is taken.

    Raises ``ValueError`` when there is none or a file is damaged.
    """
    network = open_network(path, device)
    folders = {name: memory_folder(network.folder, name) for name in network.facts["banks"]}
    banks = {name: open_bank(folder, device=device) for name, folder in folders.items()}
    return Loaded(network.decoder, banks, network.tokenizer, network.facts)


def open_network(path: Path, device: str = "cpu") -> Network:
    """As :func:`open_checkpoint`, without the banks, which stay where :func:`memory_folder` says."""
    newest = path if (path / _FACTS).exists() else latest_checkpoint(path)
    if newest is None:
        raise ValueError(f"There is no checkpoint in {path}: give a run's folder or one of its {_PREFIX}… folders.")
    facts = read_facts(newest)
    tokenizer = load_tokenizer(newest / "tokenizer.json")
    if tokenizer_digest(tokenizer) != facts["tokenizer_digest"]:
        raise ValueError(
            f"{newest / 'tokenizer.json'} is not the tokenizer of this checkpoint: restore the saved file."
        )
    decoder = Decoder(DecoderConfig.from_dict(facts["model"])).to(device)
    _load_weights(decoder, newest)
    return Network(newest, decoder.eval(), tokenizer, facts)


def memory_folder(checkpoint: Path, name: str) -> Path:
    """Where a checkpoint keeps the memory of this name."""
    return checkpoint / f"memory-{name}"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is kept."""
    return folder / f"{_PREFIX}{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    return sorted(path.parent for path in folder.glob(f"{_PREFIX}*/{_FACTS}"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder."""
    found = checkpoints(folder)
    return found[-1] if found else None


def read_facts(path: Path) -> dict[str, Any]:
    """``checkpoint.json``, and a check of the files that it vouches for. Raises ``ValueError`` naming a damaged one."""
    try:
        facts: dict[str, Any] = json.loads((path / _FACTS).read_text())
        digests = {name: facts["sha256"][name] for name in _FILES}
        {key: facts[key] for key in _KEYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / _FACTS} is damaged, or none of torch-engram's: {_MEND}.") from error
    for bank in facts["banks"]:
        if not (memory_folder(path, bank) / "memory.json").exists():
            raise ValueError(f"{memory_folder(path, bank)} is damaged or missing: {_MEND}.")
    for name, digest in digests.items():
        if not (path / name).exists() or file_digest(path / name) != digest:
            raise ValueError(f"{path / name} is truncated, damaged or missing: {_MEND}.")
    return facts


def _weights(decoder: Decoder) -> dict[str, Tensor]:
    """The state dict without the second name of a tied head."""
    weights = dict(decoder.state_dict())
    if decoder.config.tie_embeddings:
        del weights["head.weight"]
    return weights


def _load_weights(decoder: Decoder, path: Path, ranks: Ranks = ALONE) -> None:
    weights = load_file(path / "model.safetensors")
    expected = _weights(decoder)
    wrong = [name for name, tensor in expected.items() if name not in weights or weights[name].shape != tensor.shape]
    if wrong or len(weights) != len(expected):
        odd = wrong[0] if wrong else next(name for name in weights if name not in expected)
        raise ValueError(
            f"{path / 'model.safetensors'} does not fit its configuration (at {odd}): use another checkpoint."
        )
    parts = {name: ranks.part_like(tensor, expected[name]) for name, tensor in weights.items()}
    decoder.load_state_dict(parts, strict=False)


def _optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    return {
        f"{number}.{index}.{key}": value
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def _load_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor], path: Path, ranks: Ranks
) -> None:
    for number, optimizer in enumerate(optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            owner, index, key = name.split(".")
            if int(owner) == number:
                state.setdefault(int(index), {})[key] = tensor
        for number_of, values in state.items():
            for key, value in values.items():
                like = parameters[number_of] if number_of < len(parameters) else value
                if value.shape == like.shape:  # all but counts of steps
                    values[key] = ranks.part_like(value, like)
        groups = optimizer.state_dict()["param_groups"]
        try:
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path / 'optimizer.safetensors'} does not fit this run: resume with its own recipe."
            ) from error


def _save_whole(tensors: Mapping[str, Tensor], path: Path, ranks: Ranks) -> None:
    found = {name: tensor.contiguous() for name, tensor in ranks.whole(tensors).items()}
    ranks.lead(lambda: save_file(found, path))
