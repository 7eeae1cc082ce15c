"""Memories from disk onto a model: one by its folder, or all that were saved with the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from torch_engram.addressing import CanonicalVocab
from torch_engram.hub.attach import MakeOptimizer, attach_bank
from torch_engram.hub.attached import Attached, embedding_of, memories_of
from torch_engram.hub.blocks import find_blocks
from torch_engram.hub.saved import FACTS, MEMORIES, read_facts, read_modules, require_alike
from torch_engram.memory import load_bank, open_bank
from torch_engram.memory.saved import SavedMemory
from torch_engram.optim import RowAdam

_HUB_OPTIONS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}


def load_memory(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    optimizer: MakeOptimizer | None = RowAdam,
    **options: Any,
) -> Attached:
    """Attach a saved memory to a model, by its own name or another ``name``.

    ``optimizer``: as it was trained with; None to read only. ``options``: ``placement`` and ``cache``. Raises
    ``ValueError`` naming what is damaged, or what of the model or the tokenizer it does not fit; the model is then as
    it was.
    """
    folder = Path(folder)
    saved = read_facts(folder)
    _require_tokenizer(folder / saved["rows"], tokenizer)
    weights = read_modules(folder / saved["modules"])
    weight = embedding_of(model)
    rows = open_bank(folder / saved["rows"], optimizer=optimizer, device=weight.device, dtype=weight.dtype, **options)
    rows.name = name or saved["name"]
    memory = attach_bank(model, find_blocks(model, saved["blocks"]), rows)
    try:
        require_alike(memory, weights, folder / saved["modules"])
    except ValueError:
        memory.detach()
        raise
    memory.engrams.load_state_dict(weights)
    return memory


def restore_memories(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Bring the memories that are on ``model`` to what was saved with it in ``folder``: before
    ``trainer.train(resume_from_checkpoint=folder)``, which loads weights and optimisers, and no rows.

    Raises ``ValueError`` naming a memory that was not saved there, or does not fit.
    """
    for name, memory in memories_of(model).items():
        own = Path(folder) / MEMORIES / name
        saved = read_facts(own)
        weights = read_modules(own / saved["modules"])
        require_alike(memory, weights, own / saved["modules"])
        load_bank(memory.bank, own / saved["rows"])
        memory.engrams.load_state_dict(weights)


def from_pretrained(name: str | os.PathLike[str], tokenizer: Any = None, **options: Any) -> PreTrainedModel:
    """A model that was saved with its memories, and those attached. ``name``: a folder, or a repository on the Hugging
    Face hub, which is fetched whole unless it is in the cache. ``tokenizer``: theirs, by default the one that is there.
    ``options``: of ``AutoModelForCausalLM.from_pretrained``, ``revision``, ``token`` and ``local_files_only`` among
    them.

    Raises ``ValueError`` as :func:`load_memory` does, where nothing is called so, and for a folder without memories,
    model or tokenizer.
    """
    folder = Path(name) if os.path.isdir(name) else _fetched(os.fspath(name), options)
    found = [path.parent for path in (folder / MEMORIES).glob(f"*/{FACTS}")]
    if not found:
        raise ValueError(f"{name} holds no memories: load it with AutoModelForCausalLM, or attach() one.")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder) if tokenizer is None else tokenizer
    except (OSError, ValueError) as error:
        raise no_model(str(name), error) from error
    for memory in sorted(found, key=lambda folder: int(read_facts(folder)["place"])):
        load_memory(model, tokenizer, memory)
    return model


def no_model(name: str, error: Exception) -> ValueError:
    """What a user is told where transformers found no model, or no tokenizer, and said so at length."""
    return ValueError(
        f"There is no causal model with a tokenizer at {name!r} ({_said(error)}): give its folder, or a name on a "
        "hub that this machine reaches."
    )


def _fetched(name: str, options: dict[str, Any]) -> Path:
    """The folder that the cache has of a repository; takes out of ``options`` what is for the hub alone."""
    asked = {key: options.pop(key) for key in _HUB_OPTIONS & options.keys()}
    try:
        return Path(snapshot_download(name, **asked))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no folder {name!r}, nor a model of that name ({_said(error)}): give a model's folder, or a "
            "name on a hub that this machine reaches."
        ) from error


def _said(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".: ")


def _require_tokenizer(rows: Path, tokenizer: Any) -> None:
    """Before the rows, which may be many, are loaded."""
    vocab, mine = SavedMemory.read(rows).vocab, CanonicalVocab.of(tokenizer)
    if vocab is not None and vocab.digest != mine.digest:
        raise ValueError(
            f"{rows.parent} was trained with another tokenizer (canonical vocabulary {vocab.digest[:12]}, this one's "
            f"is {mine.digest[:12]}): load it with the model and the tokenizer that it was trained on."
        )
