"""What studies of pretraining share: a run, how it is trained and scored, and what sets it apart from others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_engram.analysis.seen import seen_before
from torch_engram.data import IGNORE_INDEX, Batch, PackedBatches
from torch_engram.studies.controls import control
from torch_engram.studies.ways import build_way
from torch_engram.train import Recipe, Trainer
from torch_engram.train.build import Text, build_text
from torch_engram.train.evaluate import token_losses
from torch_engram.train.guards import deterministic_kernels

TOLD = 10
"""Steps whose mean loss is one point of the curve."""
LAST = 50
"""Steps at the end whose mean loss is a run's training loss."""
Watch = Callable[[int, float], None]
"""Told of every :data:`TOLD`-th step and the mean loss of those before it."""


@dataclass(frozen=True)
class TrainingRun:
    """One training, from its recipe to its score."""

    label: str
    """Which of the study's models it trains, for people."""
    recipe: Recipe
    """Where it reads and writes is set by :func:`train_run`."""
    changed: tuple[str, ...] = ()
    """Settings in which it differs from the label's base, as ``name=value``; the seed is not among them."""
    control: str = ""
    """What its memory reads instead of its n-grams' rows: a name of :mod:`torch_engram.studies.controls`."""
    way: str = ""
    """How n-grams are used, where not by an Engram: a name of :data:`torch_engram.studies.ways.WAYS`."""
    text: str = ""
    """Digest of the text, which decides the results too."""


def made_ready(runs: Sequence[TrainingRun], data: str, device: str) -> list[TrainingRun]:
    """The runs for a device and the text ``data``, which is tokenised here once, before several processes want it. On a
    CPU nothing is compiled and all is fp32.

    Raises ``ValueError`` for a text that cannot be read, or too short to hold some of it out.
    """
    ready = []
    for run in runs:
        recipe = replace(run.recipe, device=device)
        if device == "cpu":
            recipe = replace(recipe, dtype="fp32", compile=False, capture=False)
        files = _text(replace(recipe, data=data)).files
        if files.validation is None or len(files.validation) <= recipe.seq_len:
            raise ValueError(
                f"Of {data!r} less than one sequence of {recipe.seq_len} tokens is held out, and studies score that: "
                "give a longer text, of more documents."
            )
        ready.append(replace(run, recipe=recipe, text=files.train.digest))
    return ready


def _text(recipe: Recipe) -> Text:
    """Read once a process, for a text's digest is of all its bytes."""
    key = recipe.data, recipe.tokenizer, recipe.model.vocab_size, recipe.validation_share, recipe.cache
    if key not in _TEXTS:
        _TEXTS[key] = build_text(recipe)
    return _TEXTS[key]


_TEXTS: dict[tuple[object, ...], Text] = {}


def train_run(run: TrainingRun, data: str, watch: Watch = lambda step, loss: None) -> Iterator[Any]:
    """Train on the text ``data`` and yield the one result.

    ``validation`` and, of tokens that end a 13-gram of the trained text or do not, ``seen`` and ``novel``: nats a token
    on the whole held-out split, None after a run that went astray; ``seen_share`` of its tokens; ``train``, the mean
    loss of the last steps; ``curve``, pairs of step and mean loss; ``tokens_per_second`` of all but the first steps;
    ``flops`` of a trained token, forward and backward, and ``sizes`` in parameters, by the accounting of Engrams;
    ``parameters`` of the network, by counting; ``expert_peak_load``; seconds.
    """
    begun = time.perf_counter()
    with TemporaryDirectory() as folder:  # no checkpoint is saved
        recipe = replace(run.recipe, data=data, out=folder)
        trainer = Trainer(recipe, text=_text(recipe), decoder=partial(build_way, run.way) if run.way else None)
        if run.control:
            control(trainer, run.control)
        with deterministic_kernels(recipe.deterministic):
            losses, speed = _train(trainer, watch)
        scores = _scores(trainer) if len(losses) == recipe.steps else {}
        if not math.isfinite(scores.get("validation") or math.nan):  # also where the last step led astray
            scores = dict.fromkeys(("validation", "seen", "novel", "seen_share"))
        account = trainer.account
        yield {
            "train": fmean(losses[-LAST:]) if scores["validation"] is not None else None,
            **scores,
            "curve": [[step, round(fmean(part), 5)] for step, part in _parts(losses)],
            "steps": len(losses),
            "tokens": trainer.tokens_per_step * len(losses),
            "tokens_per_second": speed,
            "flops": 3 * account.flops,
            "parameters": sum(parameter.numel() for parameter in trainer.decoder.parameters()),
            "expert_peak_load": trainer.expert_peak_load,
            "sizes": {name: getattr(account, name) for name in ("total", "active", "tables", "embedding", "rho")},
            "seconds": time.perf_counter() - begun,
        }


def _train(trainer: Trainer, watch: Watch) -> tuple[list[float], float]:
    """Each step's loss, up to where one is not finite any more, and tokens a second."""
    losses: list[float] = []
    waiting: list[Tensor] = []
    since = time.perf_counter()
    trainer.decoder.train()
    for step in range(trainer.recipe.steps):
        waiting.append(trainer.train_step()[0])
        if len(waiting) < TOLD and step + 1 < trainer.recipe.steps:
            continue
        found = torch.stack(waiting).tolist()
        if not all(map(math.isfinite, found)):
            break
        if not losses:  # the first steps compile
            since = time.perf_counter()
        losses, waiting = losses + found, []
        watch(step + 1, fmean(found))
    steps = len(losses) - TOLD
    return losses, steps * trainer.tokens_per_step / (time.perf_counter() - since) if steps > 0 else 0.0


def _parts(losses: list[float]) -> Iterator[tuple[int, list[float]]]:
    for first in range(0, len(losses), TOLD):
        part = losses[first : first + TOLD]
        yield first + len(part), part


@torch.no_grad()
def _scores(trainer: Trainer) -> dict[str, float | None]:
    """On the held-out split, whole and apart."""
    recipe, file = trainer.recipe, trainer.validation_file()
    assert file is not None, "made_ready() lets no other text through"
    device, size = recipe.device, recipe.batch_size * recipe.seq_len
    seen = seen_before(file, trainer.data, recipe.steps * recipe.accumulation, device=device)
    targets_seen = F.pad(seen[1:], (0, size))
    sums = torch.zeros(2, 2, dtype=torch.float64, device=device)  # nats and tokens, of novel and of seen ones
    data = PackedBatches(file, recipe.batch_size, recipe.seq_len)
    batches = (_whole(batch, recipe.batch_size) for batch in data.in_order())
    scored = token_losses(trainer.decoder, trainer.banks, batches, device=device, dtype=recipe.dtype)
    for number, (batch, losses) in enumerate(scored):
        wanted = (batch.targets != IGNORE_INDEX).to(device)
        here = targets_seen[number * size : (number + 1) * size].view_as(wanted)
        for row, mask in enumerate((wanted & ~here, wanted & here)):
            sums[row] += torch.stack((losses.double()[mask].sum(), mask.sum().double()))
    (novel, novel_tokens), (old, old_tokens) = sums.tolist()
    tokens = novel_tokens + old_tokens
    return {
        "validation": (novel + old) / tokens,
        "novel": novel / novel_tokens if novel_tokens else None,
        "seen": old / old_tokens if old_tokens else None,
        "seen_share": old_tokens / tokens,
        "validation_tokens": int(tokens),
        "bits_per_byte": (novel + old) / tokens / math.log(2) * len(file) / file.text_bytes,
    }


def _whole(batch: Batch, size: int) -> Batch:
    """The batch with rows of no targets up to so many, for what is compiled takes no other number."""
    more = (0, 0, 0, size - len(batch.tokens))
    return Batch(
        F.pad(batch.tokens, more),
        F.pad(batch.targets, more, value=IGNORE_INDEX),
        F.pad(batch.doc_start, more, value=True),
    )


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """All settings by dotted name, but names and places."""
    free = {"name", "data", "out", "cache", "device", "compile", "capture"}
    return {name: value for name, value in _leaves(recipe.to_dict()) if name not in free}


def _leaves(values: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{group}{name}.")
        else:
            yield group + name, value
