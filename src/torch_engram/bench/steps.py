"""Whole training steps of recipes, in turns in one process: what is compared sees the same clock rates.

Models train for real, data included. A run is in one of three forms: as its recipe is; ``naive``, where this library's
kernels give way to their twins and nothing is compiled or captured; ``compile``, the twins in compiled blocks, not
captured either. What is no kernel stays in all three: sorting experts' tokens, the loss in chunks, Muon in batches, the
prefetch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_engram.bench.ops import DTYPES, require_against
from torch_engram.bench.results import Measurement
from torch_engram.bench.timing import in_turns, median, product_rate, wall_milliseconds
from torch_engram.kernels import naive
from torch_engram.memory import Memory
from torch_engram.train.build import Text
from torch_engram.train.guards import deterministic_kernels
from torch_engram.train.loop import Trainer
from torch_engram.train.network_pass import CapturedPass
from torch_engram.train.recipe import Recipe

_NEVER = 1_000_000
"""Steps of a run: more than are timed, so that its learning rate does not reach its end."""


@dataclass
class Run:
    """A trainer in one form, past its first steps."""

    trainer: Trainer
    form: str
    step: Callable[[], object]
    memory: float | None
    """GiB that it took at most, besides what others held; None on a CPU."""

    def take(self, steps: int) -> float:
        """Milliseconds of a step, the mean of so many."""
        deterministic = deterministic_kernels(self.trainer.recipe.deterministic)
        with deterministic, nullcontext() if self.form == "ours" else naive():
            took = wall_milliseconds(self.step, steps, self.trainer.recipe.device)
            for bank in self.trainer.banks.values():
                bank.settle()
        return took


class Runs:
    """Runs that share the text that they read, and the memory of captured steps, for they take turns. Nothing is
    written but the text's cache, where the recipe has it."""

    def __init__(self, folder: str, *, warm_up: int = 5):
        self.folder, self.warm_up = folder, warm_up
        self._texts: dict[tuple[object, ...], Text] = {}
        self._pool: Any = None

    def start(self, recipe: Recipe, form: str = "ours", *, with_lookups: bool = True) -> Run:
        """A run that has taken its first steps. Without lookups its embeddings are constants that nobody fetched.

        Raises ``ValueError`` as :class:`Trainer` does, and for a model that does not fit into memory.
        """
        recipe = replace(recipe, out=self.folder, steps=_NEVER)
        if form != "ours":
            recipe = replace(recipe, compile=form == "compile", capture=False)
        if not with_lookups:  # so that no rows are under way
            recipe = replace(recipe, table=replace(recipe.table, prefetch=0))
        on_gpu = recipe.device == "cuda" and torch.cuda.is_available()
        held = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer = self._trainer(recipe)
            run = Run(trainer, form, trainer.train_step, None)
            if not with_lookups:
                run.take(1)  # schedulers want every optimiser to have stepped, the rows' too
                run.step = without_lookups(trainer)
            run.take(self.warm_up)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{recipe.name} ({form}) does not fit into memory beside the runs before it: lower batch_size."
            ) from error
        if on_gpu:
            run.memory = (torch.cuda.max_memory_allocated() - held) / 2**30
        return run

    def _trainer(self, recipe: Recipe) -> Trainer:
        source = (recipe.data, recipe.text_field, recipe.tokenizer, recipe.model.vocab_size, recipe.validation_share)
        trainer = Trainer(recipe, text=self._texts.get(source))
        self._texts[source] = trainer.text
        if isinstance(trainer.network_pass, CapturedPass):
            self._pool = trainer.network_pass.pool = self._pool or trainer.network_pass.pool
        trainer.decoder.train()
        return trainer


class _Constant:
    """In place of a working set: embeddings that nobody looks up, and gradients that nobody uses."""

    def __init__(self, name: str, leaves: dict[int, Tensor]):
        self.name, self.leaves = name, leaves

    def __getitem__(self, micro: int) -> Memory:
        def wait(layer: int) -> dict[str, Tensor]:
            if layer not in self.leaves:
                return {}
            self.leaves[layer].grad = None
            return {self.name: self.leaves[layer]}

        return Memory(wait)

    done = True

    def discard(self) -> None:
        """Nothing."""

    def of(self, bank: object) -> bool:
        """Anybody's."""
        return True

    def expand(self, layer: int, micro: int, out: Tensor) -> Tensor:
        """What is in ``out`` is as good as any."""
        return out

    def merge(self, layer: int, micro: int, grad: Tensor) -> None:
        """Nothing."""

    def reduce(self) -> None:
        """Nothing."""

    def apply(self) -> None:
        """Nothing."""


def _constant(constant: _Constant, *batches: object) -> _Constant:
    return constant


def without_lookups(trainer: Trainer) -> Callable[[], object]:
    """The step of a trainer that prefetches no step ahead, with constant embeddings."""
    recipe = trainer.recipe
    assert not recipe.table.prefetch, "rows that are under way would meet constants"
    constants = {}
    for name, bank in trainer.banks.items():
        shape = (recipe.batch_size, recipe.seq_len, bank.config.embedding_dim)
        leaves = {layer: torch.randn(shape, device=bank.device).to(bank.dtype) for layer in bank.config.layers}
        constants[name] = _Constant(name, {layer: leaf.requires_grad_() for layer, leaf in leaves.items()})

    def step() -> None:
        for name, bank in trainer.banks.items():
            bank.prefetch = partial(_constant, constants[name])  # type: ignore[method-assign, assignment]
        try:
            trainer.train_step()
        finally:
            for bank in trainer.banks.values():
                del bank.prefetch

    return step


@dataclass(frozen=True)
class StepTimes:
    """What a recipe's training step took. Times are in milliseconds, one sample a turn."""

    run: Run
    ours: list[float]
    against: list[float] | None
    without_lookups: list[float] | None
    """With constant embeddings, for a recipe with memory."""
    flops_per_ms: float
    """Of one large matrix product in the recipe's type, in the same run."""

    @property
    def recipe(self) -> Recipe:
        """The recipe as it ran."""
        return self.run.trainer.recipe

    @property
    def speed(self) -> list[float]:
        """Tokens a second."""
        return [1e3 * self.recipe.tokens_per_step / took for took in self.ours]

    @property
    def utilisation(self) -> list[float]:
        """Model FLOPs (3 times the forward's, nothing for recomputation) over those of a matrix product."""
        work = 3 * self.run.trainer.account.flops * self.recipe.tokens_per_step
        return [work / took / self.flops_per_ms for took in self.ours]

    @property
    def exposed(self) -> list[float] | None:
        """Share of the step that its lookups add to it."""
        if self.without_lookups is None:
            return None
        return [(a - b) / a for a, b in zip(self.ours, self.without_lookups, strict=True)]

    @property
    def speed_up(self) -> list[float] | None:
        """The other form's time over ours."""
        return None if self.against is None else [b / a for a, b in zip(self.ours, self.against, strict=True)]


def time_steps(
    runs: Runs, recipes: Sequence[Recipe], against: str | None = None, turns: int = 6, steps: int = 4
) -> list[StepTimes]:
    """Train every recipe, its other form, and its form without lookups, so many steps a turn. Raises ``ValueError``
    for recipes of several devices, and as :meth:`Runs.start` does."""
    require_against(against)
    if len({recipe.device for recipe in recipes}) > 1:
        raise ValueError("The recipes are for different devices: choose one for all, as with --set device=cuda.")
    started: dict[str, Run] = {}
    for number, recipe in enumerate(recipes):
        started[f"{number} ours"] = runs.start(recipe)
        if against is not None:
            started[f"{number} against"] = runs.start(recipe, against)
        if recipe.model.engrams:
            started[f"{number} without"] = runs.start(recipe, with_lookups=False)
    taken = in_turns({name: partial(run.take, steps) for name, run in started.items()}, turns)
    kinds = {recipe.dtype for recipe in recipes}
    rates = {kind: product_rate(DTYPES[kind], recipes[0].device) for kind in kinds}
    return [
        StepTimes(
            started[f"{number} ours"], taken[f"{number} ours"], taken.get(f"{number} against"),
            taken.get(f"{number} without"), rates[recipe.dtype],
        )
        for number, recipe in enumerate(recipes)
    ]  # fmt: skip


def over_experts(timed: Sequence[StepTimes]) -> Iterator[tuple[StepTimes, StepTimes, list[float]]]:
    """For each recipe with memory and experts, and each with experts alone: its step time over that one's."""
    with_experts = [one for one in timed if one.recipe.model.moe is not None]
    for one in with_experts:
        for other in with_experts:
            if one.recipe.model.engrams and not other.recipe.model.engrams:
                yield one, other, [a / b for a, b in zip(one.ours, other.ours, strict=True)]


def measurements(timed: Sequence[StepTimes], against: str | None) -> Iterator[tuple[str, Measurement]]:
    """Name of the recipe and measurement, all there are."""
    for one in timed:
        name, rate = one.recipe.name, one.flops_per_ms / 1e9
        yield name, Measurement("step", one.ours, "ms")
        yield name, Measurement("speed", one.speed, "tokens/s")
        share = median(one.utilisation)
        yield name, Measurement("flops", [u * rate for u in one.utilisation], "TFLOP/s", rate, share)
        yield name, Measurement("utilisation", one.utilisation, "of matrix product", 1.0, share)
        if one.run.memory is not None:
            yield name, Measurement("peak-memory", [one.run.memory], "GiB")
        if one.exposed is not None and one.without_lookups is not None:
            yield name, Measurement("step-without-lookups", one.without_lookups, "ms")
            yield name, Measurement("lookup-exposed", one.exposed, "of the step")
        if one.against is not None and one.speed_up is not None:
            yield name, Measurement(f"step-{against}", one.against, "ms")
            yield name, Measurement(f"{against}-over-ours", one.speed_up, "times", 1.0, median(one.speed_up))
    for one, other, ratios in over_experts(timed):
        yield one.recipe.name, Measurement(f"over-{other.recipe.name}", ratios, "times", 1.0, median(ratios))
