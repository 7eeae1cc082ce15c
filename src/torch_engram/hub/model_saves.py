"""What a model with memories does when it is saved or pushed to a hub: they go along.

``save_pretrained`` and ``push_to_hub`` stay transformers' own. The first puts the memories into the folder, too. What
both push a folder with takes no folder within a folder, which memories are, so it has another one in its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from torch import nn
from transformers import PreTrainedModel

from torch_engram.hub.attached import memories_of
from torch_engram.hub.saved import MEMORIES, save_memory

_REPLACED = ("save_pretrained", "_upload_modified_files")


def begin_saving_memories(model: PreTrainedModel) -> None:
    """From here on ``model`` is saved, and pushed, with its memories."""
    vars(model).update(zip(_REPLACED, (_saving(model), _push), strict=True))


def end_saving_memories(model: nn.Module) -> None:
    """Give ``model`` its own methods back."""
    for name in _REPLACED:
        vars(model).pop(name, None)


def _saving(model: PreTrainedModel) -> Callable[..., Any]:
    def save_pretrained(save_directory: str | os.PathLike[str], *args: Any, **named: Any) -> Any:
        if named.get("is_main_process", True):  # first, for the folder may be pushed when the model is in it
            for name, memory in memories_of(model).items():
                save_memory(memory, Path(save_directory) / MEMORIES / name)
        return type(model).save_pretrained(model, save_directory, *args, **named)

    return save_pretrained


def _push(
    working_dir: str | os.PathLike[str],
    repo_id: str,
    files_timestamps: Mapping[str, float],
    commit_message: str | None = None,
    token: bool | str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_description: str | None = None,
) -> Any:
    """In one commit: what is newer in the folder than ``files_timestamps`` by name, and all memories as they are now in
    place of those in the repository."""
    api, folder = HfApi(token=token), Path(working_dir)
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    changed = [path for path in folder.iterdir() if path.stat().st_mtime > files_timestamps.get(path.name, 0.0)]
    files = [file for path in {*changed, folder / MEMORIES} for file in (path, *path.rglob("*")) if file.is_file()]
    new = {file.relative_to(folder).as_posix(): file for file in files}
    there = api.list_repo_files(repo_id, revision=revision)
    old = [name for name in there if name.startswith(f"{MEMORIES}/") and name not in new]
    return api.create_commit(
        repo_id,
        [*map(CommitOperationDelete, old), *(CommitOperationAdd(name, str(file)) for name, file in new.items())],
        commit_message=commit_message or "Upload model with memories",
        commit_description=commit_description,
        create_pr=create_pr,
        revision=revision,
    )
