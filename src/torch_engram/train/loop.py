"""The training loop: prefetch, forward, backward, reduce, clip, step, and what surrounds them.

Read :meth:`Trainer.train_step` first: it is the whole of training with a memory.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.lr_scheduler import LambdaLR

from torch_engram.data import IGNORE_INDEX, Batch, PackedBatches, TokenFile
from torch_engram.memory import Tokens, WorkingSet
from torch_engram.models import Decoder, DecoderConfig
from torch_engram.models.accounting import Account, account
from torch_engram.train.build import (
    Text,
    build_banks,
    build_decoder,
    build_optimizers,
    build_pass,
    build_text,
    fit_to_text,
    require_machine,
)
from torch_engram.train.checkpoint import (
    checkpoint_path,
    checkpoints,
    latest_checkpoint,
    resume,
    save_checkpoint,
)
from torch_engram.train.evaluate import Score, evaluate
from torch_engram.train.guards import deterministic_kernels, interruptible, only_run
from torch_engram.train.metrics import Metrics, NoMetrics
from torch_engram.train.ranks import ranks_of
from torch_engram.train.readout import Reading, Readout
from torch_engram.train.recipe import Recipe
from torch_engram.train.same_run import data_identity, require_same_data, require_same_recipe
from torch_engram.train.schedule import factor


@dataclass(frozen=True)
class Progress:
    """What the loop tells whoever watches it of every step, on a GPU while the next one runs."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    interrupted: bool
    checkpoint: Path
    score: Score | None
    """On the whole validation split; None when the run was interrupted or has no such split."""
    tokens_per_second: float
    """Of the training steps alone."""


@dataclass(frozen=True)
class _Prepared:
    """One step's micro-batches and the working sets that were prefetched for them, by memory."""

    batches: list[Batch]
    rows: dict[str, WorkingSet]


class Trainer:
    """A run of a recipe. Building it reads the text and makes the model; :meth:`run` trains.

    ``group``: the ranks of :mod:`torch.distributed` that train it together, each on its own micro-batches; all of them
    then do the same, and its collectives take tensors of the host and of the device (``cpu:gloo,cuda:nccl``).
    ``decoder``: makes the model of the recipe and its configuration, for one that has other modules.
    Raises ``ValueError`` naming what is wrong with the recipe, the corpus, the device or the checkpoint.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        resume_run: bool = False,
        text: Text | None = None,
        group: ProcessGroup | None = None,
        decoder: Callable[[Recipe, DecoderConfig], Decoder] | None = None,
    ):
        self.ranks = ranks = ranks_of(group, recipe.device)
        require_machine(recipe, ranks.size)
        self.recipe = recipe
        self.folder = Path(recipe.out) / recipe.name
        self.text = text if text is not None else ranks.first(lambda: build_text(recipe))
        model = fit_to_text(recipe.model, self.text.tokenizer, self.text.vocab)
        self.decoder = (decoder or build_decoder)(recipe, model)
        ranks.divide(self.decoder)
        self.banks = build_banks(recipe, model, self.text.vocab, ranks)
        self.data = PackedBatches(self.text.files.train, recipe.batch_size, recipe.seq_len, recipe.seed)
        self.optimizers = build_optimizers(recipe, self.decoder, ranks)
        self.step = 0
        self.seconds = 0.0  # of training steps
        self._start_at_zero_or_resume(resume_run)
        if recipe.compile:
            self.decoder.compile_blocks(dynamic=False)  # a step's shapes never change
        self.network_pass = build_pass(recipe, self.decoder, self.banks, self.data)
        self._ahead: deque[_Prepared] = deque()
        self._drawn = self.step
        self._stop = False
        self._balance: dict[int, Tensor] = {}

    def _start_at_zero_or_resume(self, resume_run: bool) -> None:
        self._newest = newest = self.ranks.agree(latest_checkpoint(self.folder))
        if newest is not None and not resume_run:
            raise ValueError(
                f"{self.folder} already holds a run: pass --resume to go on with it, or set another name= or out=."
            )
        if resume_run and newest is None:
            raise ValueError(f"There is no checkpoint in {self.folder} to resume from: leave out --resume.")
        if newest is not None:
            require_same_recipe(newest, self.recipe)
            facts = resume(newest, self.decoder, self.banks, self.optimizers, self.text.tokenizer, self.ranks)
            require_same_data(newest, facts["data"], self._data_identity(), self.ranks.size)
            self.step, self.seconds = facts["step"], facts["seconds"]
        self._factor = partial(
            factor,
            steps=self.recipe.steps,
            warmup=self.recipe.warmup,
            schedule=self.recipe.schedule,
            floor=self.recipe.floor,
        )
        every = [*self.optimizers, *(bank.optimizer for bank in self.banks.values() if bank.optimizer is not None)]
        begun = self.step
        self._schedulers = [LambdaLR(optimizer, lambda done: self._factor(begun + done)) for optimizer in every]

    def _data_identity(self) -> dict[str, str | int]:
        return data_identity(self.recipe, self.text.files.train.digest, self.ranks.size)

    @property
    def account(self) -> Account:
        """The sizes of the decoder with its tables."""
        rows = {
            (bank.name, layer): rows for bank in self.banks.values() for layer, rows in bank.rows_per_order().items()
        }
        return account(self.decoder.config, rows, self.recipe.seq_len)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step, those of all ranks."""
        return self.recipe.tokens_per_step * self.ranks.size

    @property
    def share_seen(self) -> float:
        """Tokens trained on so far over tokens in the training split (above 1: epochs)."""
        return self.step * self.tokens_per_step / len(self.text.files.train)

    # -- one step -------------------------------------------------------------------------------------------------

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Train one step; returns its mean loss and the norm of all gradients, scalars still on the device."""
        prepared, ranks = self._next(), self.ranks
        targets = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in prepared.batches)
        divisor = ranks.sum(torch.full((), float(targets), device=self.recipe.device)).clamp_(min=1) / ranks.size
        losses = []  # over the mean number of targets a rank: gradients are averaged over the ranks
        for micro, batch in enumerate(prepared.batches):
            ranks.begin_pass(self.decoder, first=micro == 0, last=micro == len(prepared.batches) - 1)
            losses.append(self.network_pass(batch, prepared.rows, micro, divisor))
        for rows in prepared.rows.values():
            rows.reduce()
        norm = self._clip()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for rows in prepared.rows.values():
            rows.apply()
        for scheduler in self._schedulers:
            scheduler.step()
        ranks.sum_loads(self.decoder)
        self._balance = self.decoder.update_balance(self.recipe.balance_rate)
        return ranks.sum(torch.stack(losses).sum()) / ranks.size, norm

    def _next(self) -> _Prepared:
        """The coming step's batches and rows, keeping ``table.prefetch`` further steps under way."""
        last = min(self._drawn + self.recipe.table.prefetch + 1 - len(self._ahead), self.recipe.steps)
        while self._drawn < last:
            first, ranks = self._drawn * self.recipe.accumulation, self.ranks
            micros = range(first, first + self.recipe.accumulation)
            batches = [self.data.batch(micro * ranks.size + ranks.rank) for micro in micros]
            if self.recipe.device == "cuda":
                batches = [batch.pin_memory() for batch in batches]
            tokens = [Tokens(batch.tokens, doc_start=batch.doc_start) for batch in batches]
            self._ahead.append(_Prepared(batches, {name: bank.prefetch(*tokens) for name, bank in self.banks.items()}))
            self._drawn += 1
        return self._ahead.popleft()

    def _clip(self) -> Tensor:
        """Scale all gradients, rows included, to the recipe's norm; returns what it was."""
        rows = [proxy for bank in self.banks.values() for proxy in bank.parameters()]
        limit = self.recipe.clip or float("inf")
        return self.ranks.clip(self.decoder, rows, limit, foreach=self.recipe.device == "cuda")

    # -- the run --------------------------------------------------------------------------------------------------

    def run(self, watch: Callable[[Progress], None] | None = None) -> Outcome:
        """Train to the recipe's last step, or until Ctrl-C, which saves first.

        Raises ``ValueError`` when loss or gradients are no longer finite, naming the step and the last good checkpoint.
        """
        with (
            ExitStack() as held,
            deterministic_kernels(self.recipe.deterministic),
            interruptible(self._ask_to_stop),
        ):
            self.ranks.lead(lambda: held.enter_context(only_run(self.folder)))
            if self.ranks.agree(latest_checkpoint(self.folder)) != self._newest:
                raise ValueError(f"Another process trained in {self.folder} meanwhile: set another name= or out=.")
            return self._run(watch)

    def _run(self, watch: Callable[[Progress], None] | None) -> Outcome:
        recipe = self.recipe
        metrics = self.ranks.lead(lambda: Metrics(self.folder, recipe, self.step)) or NoMetrics()
        readout = Readout()
        self.decoder.train()
        try:
            while self.step < recipe.steps and not self._all_stop():
                begun = time.perf_counter()
                readout.send(self.step + 1, *self.train_step())
                self.step += 1
                readings = list(readout.read(behind=0 if self._looks_now() else 1))
                self.seconds += time.perf_counter() - begun
                self._tell(readings, watch)
                if self._is_due(recipe.log_every) or self.step == recipe.steps:
                    metrics.log(self.step, **self._line(readings[-1]))
                if self._is_due(recipe.eval_every) and self.step < recipe.steps:
                    self._validate(metrics, recipe.eval_batches)
                if self._is_due(recipe.save_every):
                    self.save()
            self._tell(readout.read(behind=0), watch)
            saved = self.save()
            score = None if self._all_stop() else self._validate(metrics, None)
        finally:
            metrics.close()
        for bank in self.banks.values():  # other ranks may still wait for what this one was to fetch
            bank.settle()
        return Outcome(self.step, self.step < recipe.steps, saved, score, self.tokens_per_second)

    def _tell(self, readings: Iterable[Reading], watch: Callable[[Progress], None] | None) -> None:
        for reading in readings:
            self._require_finite(reading)
            if watch is not None:
                watch(Progress(reading.step, self.recipe.steps, reading.loss, self.tokens_per_second))

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _looks_now(self) -> bool:
        """Whether this step's numbers are needed before the next step: to log them, or lest bad weights are saved."""
        recipe = self.recipe
        often = any(map(self._is_due, (recipe.log_every, recipe.eval_every, recipe.save_every)))
        return often or self._stop or self.step == recipe.steps

    def _ask_to_stop(self) -> None:
        self._stop = True

    def _all_stop(self) -> bool:
        """Whether any rank was asked to."""
        self._stop = self.ranks.any(self._stop)
        return self._stop

    @property
    def stopped(self) -> bool:
        """Whether Ctrl-C was pressed, though it may have been too late to leave a step out."""
        return self._stop

    @property
    def tokens_per_second(self) -> float:
        """Training tokens over the time of training steps, since step 0."""
        return self.step * self.tokens_per_step / self.seconds if self.seconds else 0.0

    def _line(self, reading: Reading) -> dict[str, float]:
        line: dict[str, float] = {
            "loss": reading.loss,
            "lr_factor": self._factor(self.step - 1),
            "grad_norm": reading.norm,
            "tokens": self.step * self.tokens_per_step,
            "tokens_per_second": self.tokens_per_second,
        }
        if self.expert_peak_load is not None:
            line["expert_peak_load"] = self.expert_peak_load
        return line

    @property
    def expert_peak_load(self) -> float | None:
        """Tokens of the busiest expert over the mean, in the layer where that is most, in the last step; None without
        experts. Waits for the device."""
        return max(map(float, self._balance.values())) if self._balance else None

    def validation_file(self) -> TokenFile | None:
        """The held-out split, where it is at least one sequence long."""
        file = self.text.files.validation
        return file if file is not None and len(file) > self.recipe.seq_len else None

    def _validate(self, metrics: NoMetrics, batches: int | None) -> Score | None:
        file = self.validation_file()
        if file is None:
            return None
        score = self.score(file, batches)
        if not math.isfinite(score.nats):
            raise ValueError(self._astray(f"The validation loss is {score.nats} after step {self.step}", self.step))
        metrics.log(self.step, validation=score.nats, bits_per_byte=score.bits_per_byte)
        return score

    def score(self, file: TokenFile, batches: int | None = None) -> Score:
        """The present model's on a split, as :func:`evaluate` gives it, by all ranks."""
        recipe = self.recipe
        return evaluate(
            self.decoder,
            self.banks,
            file,
            batch_size=recipe.batch_size,
            seq_len=recipe.seq_len,
            device=recipe.device,
            dtype=recipe.dtype,
            batches=batches,
            ranks=self.ranks,
        )

    def _require_finite(self, reading: Reading) -> None:
        """For a step's loss and gradients; a checkpoint of the weights that gave them is no good one."""
        if math.isfinite(reading.loss) and math.isfinite(reading.norm):
            return
        what = "The norm of the gradients" if math.isfinite(reading.loss) else "The loss"
        value = reading.norm if math.isfinite(reading.loss) else reading.loss
        raise ValueError(self._astray(f"{what} is {value} at step {reading.step}", reading.step - 1))

    def _astray(self, what: str, step: int) -> str:
        """The sentence about a run whose weights after ``step`` are no good."""
        saved = checkpoints(self.folder)
        bad = saved.pop() if saved and saved[-1] == checkpoint_path(self.folder, step) else None
        good = f"the last good checkpoint is {saved[-1]}" if saved else "there is no good checkpoint"
        mend = f"; remove {bad}, which gives the same" if bad is not None else ""
        return f"{what}: lower the learning rates; {good}{mend}."

    def save(self) -> Path:
        """Save a checkpoint of the present step; returns its folder. Raises ``ValueError`` for weights that are not
        finite: no good checkpoint should make room for them."""
        if not self.ranks.is_finite(self.decoder):
            raise ValueError(self._astray(f"The weights are not finite after step {self.step}", self.step))
        facts = {"recipe": self.recipe.to_dict(), "data": self._data_identity(), "seconds": self.seconds}
        self._newest = save_checkpoint(
            self.folder,
            self.step,
            self.decoder,
            self.banks,
            self.optimizers,
            self.text.tokenizer,
            facts,
            self.recipe.keep,
            self.ranks,
        )
        return self._newest
