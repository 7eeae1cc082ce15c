"""Fine-tuning a model of transformers on text: a memory alone, with LoRA adapters, or with all of the model's weights.

The loop is transformers' ``Trainer``. What is here is what surrounds it: packed text, the parts that are trained, a
checkpoint that has the memory in it, the loss on held-out text before and after, and a card that says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from torch_engram.config import nearest
from torch_engram.data import IGNORE_INDEX, TokenFile, TokenFiles, open_corpus, tokenize_corpus
from torch_engram.durable import replacing, write_json
from torch_engram.hub.attach import attach, config_for
from torch_engram.hub.attached import Attached
from torch_engram.hub.loading import no_model, restore_memories
from torch_engram.optim import RowAdam
from torch_engram.stores import make_keys
from torch_engram.train.build import require_device
from torch_engram.train.ranks import launched_ranks

TRAINS = ("memory", "lora", "full")
METRICS, CARD = "metrics.json", "README.md"


@dataclass(frozen=True)
class Finetuning:
    """What is trained on what, and how. Raises ``ValueError`` naming a field that does not fit."""

    model: str
    """A folder, or a name on the Hugging Face hub."""
    data: str
    """A text file, a folder of them, or a dataset's name."""
    out: str
    trains: str = "memory"
    """``memory`` alone, ``lora``: memory and adapters, ``full``: memory and all weights."""
    memory: dict[str, Any] = field(default_factory=lambda: {"layers": (1,), "rows_per_head": 50_000})
    """Fields of :class:`~torch_engram.config.EngramConfig`."""
    placement: str = "device"
    steps: int = 500
    batch_size: int = 8
    accumulation: int = 1
    seq_len: int = 512
    lr: float = 1e-3
    """Of modules, adapters and weights."""
    row_lr: float = 1e-2
    rank: int = 8
    """Of the adapters."""
    held_out: float = 0.05
    """Share of documents that are not trained on."""
    save_every: int = 100
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        require_device(self.device)
        if self.trains not in TRAINS:
            raise ValueError(f"trains is {self.trains!r}: {nearest(self.trains, TRAINS)}")
        for name in ("steps", "batch_size", "accumulation", "seq_len", "rank", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")


@dataclass(frozen=True)
class Finetuned:
    """How it ended. Losses are in nats a token of the held-out text; None where nothing was held out."""

    before: float | None
    after: float | None
    seconds: float
    tokens: int
    rows_touched: int
    trained_weights: int


class Sequences(Dataset[dict[str, Tensor]]):
    """Windows of a token file as a ``Trainer`` takes them: documents are kept apart by their positions."""

    def __init__(self, file: TokenFile, length: int):
        if len(file) < length:
            raise ValueError(f"{file.path} has {len(file)} tokens, fewer than seq_len={length}: give more text.")
        self._file, self._length = file, length

    def __len__(self) -> int:
        return len(self._file) // self._length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        first = number * self._length
        ids = torch.from_numpy(self._file.tokens[first : first + self._length].astype("int64"))
        starts = torch.from_numpy(self._file.starts.copy())
        starts = starts[(starts > first) & (starts < first + self._length)] - first
        begin = torch.zeros_like(ids).scatter_(0, starts, starts)  # of its document, at every document's first token
        positions = torch.arange(self._length) - begin.cummax(0).values
        return {"input_ids": ids, "labels": ids.index_fill(0, starts, IGNORE_INDEX), "position_ids": positions}


def finetune(plan: Finetuning, resume: bool = False, watch: Callable[[int, float], None] | None = None) -> Finetuned:
    """Train, save model and memory to ``plan.out`` with metrics and a card. ``watch``: is told of steps and losses.

    Raises ``ValueError`` naming what is wrong with the model, the text or the folder, and where it is one of several
    ranks.
    """
    ranks = launched_ranks()
    if ranks > 1:
        raise ValueError(
            f"This is one of {ranks} ranks, and finetune trains in one process: start it without torchrun, or attach() "
            "a memory in a script of your own with Trainer."
        )
    out = Path(plan.out)
    checkpoint = get_last_checkpoint(plan.out) if out.is_dir() else None
    if checkpoint is not None and not resume:
        raise ValueError(f"{out} holds a run already: pass --resume to go on with it, or give another folder.")
    if checkpoint is None and resume:
        raise ValueError(f"There is no checkpoint in {out} to resume from: leave out --resume.")
    torch.manual_seed(plan.seed)
    model, tokenizer, memory = build(plan)
    files = _files(plan, tokenizer)
    trainer = make_trainer(plan, model, memory, files, watch)
    before = _loss(trainer, out, resume)
    if checkpoint is not None:
        restore_memories(model, checkpoint)
    begun = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - begun
    after = trainer.evaluate()["eval_loss"] if trainer.eval_dataset is not None else None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    trained = [weight.numel() for weight in model.parameters() if weight.requires_grad]
    done = Finetuned(
        before, after, seconds, plan.steps * plan.batch_size * plan.accumulation * plan.seq_len,
        rows_trained(memory), sum(trained),
    )  # fmt: skip
    write_json(out / METRICS, {"plan": asdict(plan), "result": asdict(done), "log": trainer.state.log_history})
    with replacing(out / CARD) as file:
        file.write(card(plan, done, memory).encode())
    return done


def build(plan: Finetuning) -> tuple[PreTrainedModel, Any, Attached]:
    """The model with what is trained of it, and its tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(plan.model)
        model: Any = AutoModelForCausalLM.from_pretrained(plan.model, dtype=getattr(torch, plan.dtype))
    except (OSError, ValueError) as error:
        raise no_model(plan.model, error) from error
    model = model.to(plan.device)
    if plan.trains == "lora":
        try:
            import peft
        except ImportError as error:
            raise ValueError("LoRA needs the package peft: pip install peft.") from error
        model = peft.get_peft_model(model, peft.LoraConfig(r=plan.rank, target_modules="all-linear"))
    memory = attach(
        model, tokenizer, config_for(model, tokenizer, **plan.memory), placement=plan.placement,
        optimizer=lambda rows: RowAdam(rows, lr=plan.row_lr), seed=plan.seed,
    )  # fmt: skip
    if plan.trains == "full":
        model.requires_grad_(True)
    return model, tokenizer, memory


def make_trainer(
    plan: Finetuning,
    model: PreTrainedModel,
    memory: Attached,
    files: TokenFiles,
    watch: Callable[[int, float], None] | None,
) -> Trainer:
    """Transformers' own, over packed sequences."""
    arguments = TrainingArguments(
        plan.out, max_steps=plan.steps, per_device_train_batch_size=plan.batch_size, seed=plan.seed,
        per_device_eval_batch_size=plan.batch_size, gradient_accumulation_steps=plan.accumulation,
        lr_scheduler_type="cosine", warmup_steps=max(1, plan.steps // 50), logging_steps=1, save_steps=plan.save_every,
        save_total_limit=2, report_to=[], disable_tqdm=True, use_cpu=plan.device == "cpu", bf16=False,
    )  # fmt: skip
    held_out = None if files.validation is None else Sequences(files.validation, plan.seq_len)
    return Trainer(
        model, arguments, train_dataset=Sequences(files.train, plan.seq_len), eval_dataset=held_out,
        optimizers=(memory.optimizer(lr=plan.lr), None), callbacks=[_Watch(watch)],
    )  # fmt: skip


def card(plan: Finetuning, done: Finetuned, memory: Attached) -> str:
    """What somebody who is given the folder wants to know, in Markdown."""
    config = memory.bank.config
    facts = {
        "base model": f"`{plan.model}`",
        "trained": {"memory": "the memory", "lora": "the memory and LoRA", "full": "the memory and all weights"}[
            plan.trains
        ],
        "text": f"`{plan.data}`",
        "blocks": ", ".join(map(str, config.layers)),
        "rows": f"{memory.bank.rows:,} of {config.row_dim} numbers, {done.rows_touched:,} trained",
        "tokens": f"{done.tokens:,} in {done.seconds:,.0f} s",
        "loss on held-out text": _told(done),
    }
    lines = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    return f"# {Path(plan.out).name}\n\n| | |\n|---|---|\n{lines}\n\nLoad it with `torch_engram.hub.from_pretrained`.\n"


def _told(done: Finetuned) -> str:
    if done.before is None or done.after is None:
        return "nothing was held out"
    return f"{done.before:.4f} before, {done.after:.4f} after (nats a token)"


def _files(plan: Finetuning, tokenizer: Any) -> TokenFiles:
    cache = Path(plan.out) / "tokens"
    return tokenize_corpus(open_corpus(plan.data), tokenizer.backend_tokenizer, cache, validation_share=plan.held_out)


def _loss(trainer: Trainer, out: Path, resume: bool) -> float | None:
    """On held-out text before anything was trained; a resumed run has it from the one that began."""
    kept = out / "before.json"
    if trainer.eval_dataset is None:
        return None
    if resume and kept.exists():
        return float(json.loads(kept.read_text()))
    loss = float(trainer.evaluate()["eval_loss"])
    write_json(kept, loss)
    return loss


def rows_trained(memory: Attached) -> int:
    """Rows of a memory that are no longer zero, as they all begin."""
    bank = memory.bank
    bank.flush()
    found = 0
    for table in bank.tables:
        source = bank.source(table)
        for rows in torch.arange(table.rows, device=bank.device).split(1 << 16):
            keys = make_keys(table.space, rows)
            found += int(source.format.decode(keys, source.store.fetch(keys))["value"].any(1).sum())
    return found


class _Watch(TrainerCallback):
    def __init__(self, watch: Callable[[int, float], None] | None):
        self._watch = watch

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._watch is not None and logs and "loss" in logs:
            self._watch(state.global_step, float(logs["loss"]))
