"""Whether a run that is resumed would go on as the one that was saved: what decides what it learns, and its batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch_engram.train.checkpoint import read_facts
from torch_engram.train.recipe import Recipe, differences


def require_same_recipe(newest: Path, recipe: Recipe) -> None:
    """Raises ``ValueError`` naming a setting that would make the resumed run another one."""
    facts = read_facts(newest)
    if recipe.steps < facts["step"]:
        raise ValueError(f"{newest} is past steps={recipe.steps}: resume with {facts['step']} or more.")
    try:
        before = Recipe.from_dict(facts["recipe"]).to_dict()  # what it does not name had its default
    except ValueError as error:
        raise ValueError(
            f"{newest} was saved by another version of torch-engram ({error}) Resume with that version, or start "
            "anew under another name=."
        ) from error
    for key, (saved, mine) in differences(before, recipe.to_dict()).items():
        raise ValueError(
            f"{newest} was trained with {key}={saved}, not {mine}: resume with --set {key}={saved}, or start anew "
            "under another name=."
        )


def data_identity(recipe: Recipe, digest: str, ranks: int) -> dict[str, str | int]:
    """What decides the batches of a step. ``accumulation`` counts the micro-batches of all ranks, whose order does not
    depend on how many share them."""
    return {
        "digest": digest,
        "seq_len": recipe.seq_len,
        "batch_size": recipe.batch_size,
        "accumulation": recipe.accumulation * ranks,
        "seed": recipe.seed,
    }


def require_same_data(newest: Path, before: Mapping[str, str | int], mine: Mapping[str, str | int], ranks: int) -> None:
    """Raises ``ValueError`` for other batches: the two are of :func:`data_identity`."""
    if before == mine:
        return
    what = f"{newest} was trained on other data or batches"
    micro = before.get("accumulation")
    if not isinstance(micro, int) or {**before, "accumulation": 0} != {**mine, "accumulation": 0}:
        raise ValueError(f"{what}: resume with the settings that it was made with.")
    mend = f"set accumulation={micro // ranks}" if micro % ranks == 0 else f"start as many ranks as divide {micro}"
    raise ValueError(
        f"{what}: its steps are of {micro} micro-batches, and these, on {ranks} rank{'s' * (ranks > 1)}, of "
        f"{mine['accumulation']}; {mend}."
    )
