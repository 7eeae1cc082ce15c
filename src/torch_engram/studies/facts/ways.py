"""Three ways to teach a pretrained model: a memory beside its frozen weights, LoRA, and all of its weights.

LoRA's rank is such that a token reads as many trained bytes of it as of the memory: its rows and its modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from torch_engram.config import EngramConfig
from torch_engram.fusion import Engram
from torch_engram.hub import Attached, attach, config_for
from torch_engram.hub.finetune import rows_trained
from torch_engram.optim import RowAdam

Way = Literal["memory", "lora", "full"]


@dataclass(frozen=True)
class Rates:
    """Learning rates of weights and of rows."""

    weights: float
    rows: float = 0.0


@dataclass
class Taught:
    """A model that is being taught, its optimiser, and the trained numbers that a token reads."""

    model: Any
    optimizer: Optimizer
    read: int
    memory: Attached | None = None

    def trained(self) -> int:
        """Trained numbers: rows count once they are no longer zero."""
        if self.memory is None:
            return _count(self.weights())
        width: int = self.memory.bank.config.row_dim  # type: ignore[assignment]
        return _count(self.memory.engrams.parameters()) + rows_trained(self.memory) * width

    def weights(self) -> list[Tensor]:
        """Whose gradients are clipped."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def at(self, positions: Tensor) -> AbstractContextManager[None]:
        """Within, a memory is taught at ``positions`` ``[B, T]`` alone."""
        return nullcontext() if self.memory is None else self.memory.only_at(positions)

    def rehearsing(self) -> AbstractContextManager[None]:
        """Within, a memory is taught no new rows; those that it has, and its modules, learn."""
        return nullcontext() if self.memory is None else self.memory.only_taught()


def begin(way: Way, model: Any, tokenizer: Any, memory: dict[str, Any], rates: Rates) -> Taught:
    """A model as it is before the first step of ``way``. ``memory``: fields of its :class:`EngramConfig`, from which
    LoRA's rank follows."""
    if way == "full":
        model.requires_grad_(True)
        return Taught(model, _adamw(model, rates), _count(model.parameters()))
    config = config_for(model, tokenizer, **memory)
    if way == "memory":
        attached = attach(model, tokenizer, config, optimizer=lambda rows: RowAdam(rows, lr=rates.rows))
        return Taught(model, attached.optimizer(lr=rates.weights), read_by_a_token(config), attached)
    adapted = _with_lora(model, lora_rank(model, read_by_a_token(config)))
    return Taught(adapted, _adamw(adapted, rates), _count(w for w in adapted.parameters() if w.requires_grad))


def read_by_a_token(config: EngramConfig) -> int:
    """Trained numbers of a memory that one token needs: its rows at every layer, and all modules."""
    return len(config.layers) * (config.embedding_dim + _count(Engram(config).parameters()))


def lora_rank(model: nn.Module, read: int) -> int:
    """Of adapters that have about ``read`` numbers."""
    linear = [each for name, each in model.named_modules() if isinstance(each, nn.Linear) and "lm_head" not in name]
    return max(1, round(read / sum(each.in_features + each.out_features for each in linear)))


def _with_lora(model: Any, rank: int) -> Any:
    """Adapters at all linear maps of the blocks."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames what peft asks for
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _adamw(model: nn.Module, rates: Rates) -> AdamW:
    return AdamW([w for w in model.parameters() if w.requires_grad], lr=rates.weights, weight_decay=0.0)


def _count(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)
