"""Attached memories on disk: each in a folder of its own, and with a model's ``save_pretrained`` all of them.

A memory's folder has its rows as :func:`~torch_engram.memory.save_bank` writes them, its modules in one safetensors
file, and ``attached.json``, which names both and is replaced last: a save that is killed leaves the earlier one whole.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from torch_engram.durable import alone_in, replacing, sync, write_json
from torch_engram.hub.attached import Attached
from torch_engram.memory import save_bank

MEMORIES = "memories"
"""The folder of a model's memories, in the model's own."""
FACTS, FORMAT = "attached.json", 1
_ROWS, _MODULES = re.compile(r"rows-[0-9a-f]{8}"), re.compile(r"modules-[0-9a-f]{8}\.safetensors.*")


def save_memory(memory: Attached, folder: str | os.PathLike[str], *, touched_only: bool = False) -> None:
    """Write a memory to ``folder``: rows with their optimiser's state, modules, configuration, canonical vocabulary.

    ``touched_only``: leave out the rows that no step has changed, which are what :func:`attach` makes them; the folder
    grows with what was learned, and not with the table. Otherwise, over an earlier save only rows that changed are
    written. Processes of one machine save into a folder one after the other. Raises ``OSError`` when the disk is full;
    what was there before is then whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, wait=True):
        _write(memory, folder, touched_only)


def _write(memory: Attached, folder: Path, touched_only: bool) -> None:
    earlier = read_facts(folder) if (folder / FACTS).exists() else None
    mark = secrets.token_hex(4)
    rows, modules = f"rows-{mark}", f"modules-{mark}.safetensors"
    since = None if earlier is None else folder / earlier["rows"]
    save_bank(memory.bank, folder / rows, since, touched_only=touched_only)
    with replacing(folder / modules) as file:
        file.write(save({name: weight.contiguous().cpu() for name, weight in memory.engrams.state_dict().items()}))
    facts = {"name": memory.name, "place": memory.place, "blocks": memory.blocks.path, "rows": rows, "modules": modules}
    write_json(folder / FACTS, {"format": FORMAT, **facts})
    sync(folder)
    for path in folder.iterdir():
        if path.name not in (rows, modules):
            if _ROWS.fullmatch(path.name):
                shutil.rmtree(path)
            elif _MODULES.fullmatch(path.name):
                path.unlink()


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``attached.json`` says. Raises ``ValueError`` where it is missing or damaged."""
    path = folder / FACTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["format"] == FORMAT
        parts = content["rows"], content["modules"]
        assert _ROWS.fullmatch(parts[0]) and _MODULES.fullmatch(parts[1])
        return {
            **content, "name": str(content["name"]), "place": int(content["place"]), "blocks": str(content["blocks"])
        }  # fmt: skip
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no memory of a model: there is no {FACTS} in it.") from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is damaged or of a newer version: use an intact copy.") from error


def require_alike(memory: Attached, weights: dict[str, Tensor], path: Path) -> None:
    """Raises ``ValueError`` unless ``weights``, read from ``path``, are as many and as large as the memory's modules
    have."""
    own = memory.engrams.state_dict()
    wrong = sorted(own.keys() ^ weights.keys()) or [key for key in own if own[key].shape != weights[key].shape]
    if wrong:
        raise ValueError(f"{path} does not fit its configuration: see its tensor {wrong[0]!r}.")


def read_modules(path: Path) -> dict[str, Tensor]:
    """Weights by name. Raises ``ValueError`` where the file is missing or damaged."""
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): use an intact copy.") from error
