"""A recipe: everything that decides a training run, as nested frozen values that ``--set`` can reach by dotted name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_engram.config import checked_fields, nearest, need
from torch_engram.memory.placement import PLACEMENTS, require_known
from torch_engram.models import DecoderConfig
from torch_engram.optim import ROW_OPTIMIZERS
from torch_engram.sizes import parse_size
from torch_engram.stores import CODECS
from torch_engram.train.schedule import SCHEDULES

DEVICES = ("cpu", "cuda")
DTYPES = ("fp32", "bf16")
ON_DISK = "disk"
"""The placement of rows that are trained in a folder of the run."""
TRACKERS = ("none", "trackio", "tensorboard")


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of the backbone."""

    matrices: float = 4e-3
    """Muon: attention, feed-forward, expert and projection matrices."""
    embedding: float = 4e-3
    """Adam: token embedding, and the head where it is tied."""
    head: float = 2e-3
    """Adam: an untied head."""
    router: float = 5e-4
    """Adam: routers, which overload experts at more."""
    other: float = 4e-3
    """Adam: norms, convolutions, gains."""
    weight_decay: float = 0.0
    """Decoupled, on matrices only."""

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self)):
            need(self, getattr(self, name) >= 0, name, "it must not be negative.")


@dataclass(frozen=True)
class TableRecipe:
    """How tables are kept and trained, at their own learning rate and without weight decay unless it is set."""

    optimizer: str = "adam"
    """``adam`` (two moments a number), ``rowwise_adam`` (one number a row), ``adagrad`` (one sum a number) or
    ``sinkhorn`` (one momentum a number, balanced over the step's rows)."""
    lr: float = 1e-2
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled, at the steps that touch a row."""
    lazy_decay: bool = False
    """Whether a row, when it is touched, also decays for the steps that it missed, each at that step's rate."""
    placement: str = "device"
    """Where rows live: ``device``, ``host``, or ``disk``, in files of the run's folder that go at its end."""
    cache: str | None = None
    """Bytes of the device for rows of the host or the disk that were read lately, such as ``8GB``; the trajectory does
    not depend on it."""
    staging: str | None = None
    """Bytes of host memory for blocks of a table on disk that were used lately, such as ``16GB``, by default an eighth
    of what is free; the trajectory does not depend on it."""
    codec: str = "fp32"
    """How values are stored: ``fp32`` or ``bf16``."""
    prefetch: int = 0
    """Steps that rows are fetched ahead; the trajectory does not depend on it."""

    def __post_init__(self) -> None:
        need(self, self.optimizer in ROW_OPTIMIZERS, "optimizer", nearest(self.optimizer, ROW_OPTIMIZERS))
        for name in ("lr", "weight_decay", "prefetch"):
            need(self, getattr(self, name) >= 0, name, "it must not be negative.")
        need(self, self.weight_decay > 0 or not self.lazy_decay, "lazy_decay", "set a weight_decay for it to collect.")
        taken = self.lr * self.weight_decay
        need(self, taken < 1 or not self.lazy_decay, "lazy_decay", "lr * weight_decay must be below 1 for it.")
        require_known(self.codec, self.placement, (*PLACEMENTS, ON_DISK))
        if self.cache is not None:
            parse_size(self.cache)
            need(
                self,
                self.placement != "device",
                "cache",
                "it is for rows elsewhere: set table.placement=host, or disk.",
            )
        if self.staging is not None:
            parse_size(self.staging)
            need(self, self.placement == ON_DISK, "staging", "it is for rows on disk: set table.placement=disk.")
        need(self, CODECS[self.codec].trains, "codec", "it rounds small updates away: train in fp32 or bf16.")


@dataclass(frozen=True)
class Recipe:
    """One training run. Raises ``ValueError`` naming the field and the mend."""

    name: str
    """Names the run's folder."""
    model: DecoderConfig
    """The decoder. ``vocab_size`` is what a tokenizer is trained to; with a given tokenizer it follows that one."""
    data: str = "demo"
    """A text file, a folder, the name of a dataset, or ``demo`` for the shipped corpus."""
    text_field: str = "text"
    """The field of a dataset or of JSON lines that holds the text."""
    tokenizer: str | None = None
    """A ``tokenizer.json``, its folder or a model's name; None trains one on the corpus."""
    validation_share: float = 0.02
    """Share of documents held out, by a hash of their text."""
    out: str = "runs"
    """The run is kept in ``out/name``."""
    cache: str = "runs/cache"
    """Tokenised corpora and trained tokenizers are kept here."""
    seq_len: int = 512
    """T: tokens a sequence."""
    batch_size: int = 16
    """B: sequences a micro-batch."""
    accumulation: int = 1
    """Micro-batches an optimiser step."""
    steps: int = 1000
    """Optimiser steps."""
    warmup: int = 50
    """Steps of linear warm-up."""
    schedule: str = "cosine"
    """Decay: ``cosine``, ``linear`` or ``step``."""
    floor: float = 0.05
    """Share of the peak rate that decay ends at."""
    clip: float = 1.0
    """Largest norm of all gradients together, rows included; 0 for none."""
    rates: Rates = field(default_factory=Rates)
    """The backbone's learning rates."""
    table: TableRecipe = field(default_factory=TableRecipe)
    """The tables' placement and optimiser."""
    balance_rate: float = 1e-2
    """Step of the experts' balancing bias."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    dtype: str = "fp32"
    """``fp32``, or ``bf16`` for mixed precision with fp32 weights."""
    fp8: bool = False
    """The memories' matrix products in FP8 with block scales, forward and backward."""
    compile: bool = False
    """Compile the blocks."""
    recompute: bool = False
    """Run blocks again in the backward instead of keeping their activations."""
    capture: bool = False
    """Replay forward and backward from a CUDA graph, so that the host launches one thing and not thousands."""
    deterministic: bool = False
    """Only deterministic kernels, so that a GPU run repeats bit for bit (CPU runs always do)."""
    seed: int = 0
    """Of the weights' start, the rows' start and the order of the data."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 250
    """Steps between validations; one is always done at the end."""
    eval_batches: int = 20
    """Micro-batches of a validation on the way; the one at the end reads the whole split."""
    save_every: int = 500
    """Steps between checkpoints; one is always saved at the end. 0 for the end alone."""
    keep: int = 2
    """Checkpoints kept."""
    tracker: str = "none"
    """Send metrics also to ``trackio`` or ``tensorboard``."""

    def __post_init__(self) -> None:
        for name in ("name", "data", "out", "cache"):
            need(self, getattr(self, name) != "", name, "it must not be empty.")
        for name in (
            "seq_len",
            "batch_size",
            "accumulation",
            "steps",
            "log_every",
            "eval_every",
            "eval_batches",
            "keep",
        ):
            need(self, getattr(self, name) >= 1, name, "it must be at least 1.")
        for name in ("warmup", "save_every", "clip", "floor", "balance_rate"):
            need(self, getattr(self, name) >= 0, name, "it must not be negative.")
        need(self, self.name == Path(self.name).name, "name", "it names one folder, so leave out separators.")
        need(self, self.floor <= 1, "floor", "it is a share of the peak rate, 1 at most.")
        need(self, 0 <= self.seed < 1 << 63, "seed", "it must be 0 to 2**63 - 1.")
        need(self, self.schedule in SCHEDULES, "schedule", nearest(self.schedule, SCHEDULES))
        need(self, self.device in DEVICES, "device", "use 'cpu' or 'cuda'.")
        need(self, self.dtype in DTYPES, "dtype", nearest(self.dtype, DTYPES))
        need(self, self.tracker in TRACKERS, "tracker", nearest(self.tracker, TRACKERS))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch_size * self.accumulation * self.seq_len

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        rates, table = dataclasses.asdict(self.rates), dataclasses.asdict(self.table)
        return {**fields, "model": self.model.to_dict(), "rates": rates, "table": table}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`. Raises ``ValueError`` for a field that there is not."""
        nested = {
            "model": DecoderConfig.from_dict(fields["model"]),
            "rates": Rates(**checked_fields(Rates, fields["rates"])),
            "table": TableRecipe(**checked_fields(TableRecipe, fields["table"])),
        }
        return cls(**{**checked_fields(cls, fields), **nested})


_FREE_TO_CHANGE = {
    "name", "data", "text_field", "tokenizer", "out", "cache", "steps", "model", "device",
    "compile", "recompute", "capture", "deterministic",
    "log_every", "eval_every", "eval_batches", "save_every", "keep", "tracker",
    "table.placement", "table.cache", "table.staging", "table.prefetch",
    "seq_len", "batch_size", "accumulation", "seed", "validation_share",
}  # fmt: skip
"""What a resumed run may change, or what is compared otherwise: model, tokenizer and data by what they are."""


def differences(saved: Mapping[str, Any], mine: Mapping[str, Any], group: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of settings that decide what a run learns and differ between two recipes, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, value in mine.items():
        key, other = group + name, saved.get(name)
        if key in _FREE_TO_CHANGE:
            continue
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found |= differences(other, value, f"{key}.")
        elif value != other:
            found[key] = other, value
    return found
