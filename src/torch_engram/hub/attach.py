"""Give a model a memory: what fits it, what is checked before anything changes, and what keeps its memories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from torch_engram.addressing import CanonicalVocab
from torch_engram.config import EngramConfig
from torch_engram.hub.attached import ATTRIBUTE, Attached, embedding_of, memories_of
from torch_engram.hub.blocks import Blocks, find_blocks
from torch_engram.hub.model_saves import begin_saving_memories, end_saving_memories
from torch_engram.memory import MemoryBank
from torch_engram.optim import RowAdam, RowOptimizer

_MISFIT = "EngramConfig.{} is {}, and the {} has {}: use config_for(model, tokenizer, ...)."
MakeOptimizer = Callable[[list[nn.Parameter]], RowOptimizer]


def config_for(model: nn.Module, tokenizer: Any, *, blocks: str | None = None, **fields: Any) -> EngramConfig:
    """An :class:`EngramConfig` with the width, the branches and the canonical vocabulary that fit a model and its
    tokenizer. ``fields``: the others, ``layers`` among them."""
    found, vocab = find_blocks(model, blocks), CanonicalVocab.of(tokenizer)
    return EngramConfig(hidden=found.hidden, branches=found.branches, vocab_size=vocab.size, **fields)


def attach(
    model: PreTrainedModel,
    tokenizer: Any,
    config: EngramConfig,
    *,
    name: str = "memory",
    optimizer: MakeOptimizer | None = RowAdam,
    blocks: str | None = None,
    **options: Any,
) -> Attached:
    """Give ``model`` a memory, and freeze its own weights: the memory alone is trained, until others are unfrozen.
    Of a model with PEFT adapters those are trained along.

    ``optimizer``: of the rows, as :class:`MemoryBank` takes it; None for a memory that is only read. ``blocks``: the
    path of the list of decoder blocks, where it is not found. ``options``: ``placement``, ``cache``, ``codec``,
    ``tables`` and ``seed``, as for :class:`MemoryBank`. Rows start at zero: the model's logits are what they were.
    Processes that train a model together attach the same, and wrap it in ``DistributedDataParallel`` afterwards.

    Raises ``ValueError`` naming what does not fit: the model, a layer, the tokenizer, the configuration.
    """
    found, vocab = find_blocks(model, blocks), CanonicalVocab.of(tokenizer)
    _require_fit(model, found, config, name)
    if config.vocab_size != vocab.size:
        raise ValueError(_MISFIT.format("vocab_size", config.vocab_size, "tokenizer", vocab.size))
    weight = embedding_of(model)
    bank = MemoryBank(
        config, vocab, optimizer=optimizer, name=name, device=weight.device, dtype=weight.dtype, **options
    )
    return attach_bank(model, found, bank)


def attach_bank(model: PreTrainedModel, blocks: Blocks, bank: MemoryBank) -> Attached:
    """:func:`attach` with a bank that is there already. Raises ``ValueError`` where it does not fit the model."""
    _require_fit(model, blocks, bank.config, bank.name)
    if bank.exchange is not None:
        raise ValueError("Every rank keeps all rows of a memory that is on a model: leave out group=.")
    memory = Attached(model, blocks, bank)
    if not hasattr(model, ATTRIBUTE):
        model.add_module(ATTRIBUTE, _Memories(model))
    getattr(model, ATTRIBUTE)[bank.name] = memory
    return memory


def _require_fit(model: PreTrainedModel, blocks: Blocks, config: EngramConfig, name: str) -> None:
    """Before anything is changed."""
    kind, layers, weight = type(model).__name__, len(blocks.all), embedding_of(model)
    if not weight.is_floating_point():
        raise ValueError(
            f"The input embedding of {kind} is quantised to {weight.dtype}, and a memory takes its type from there: "
            "leave the embedding out of the quantisation."
        )
    for field, has in (("hidden", blocks.hidden), ("branches", blocks.branches)):
        if getattr(config, field) != has:
            raise ValueError(_MISFIT.format(field, getattr(config, field), "model", has))
    if config.layers[-1] >= layers:
        raise ValueError(
            f"{kind} has {layers} blocks, 0 to {layers - 1}, and no block {config.layers[-1]}: choose others."
        )
    if name in memories_of(model):
        raise ValueError(f"{kind} has a memory {name!r} already: detach it first, or give this one another name.")
    if not name.isidentifier() or hasattr(_Memories, name):
        raise ValueError(f"{name!r} is no name for a memory: use another, of letters, digits and underscores.")


class _Memories(nn.ModuleDict):
    """A model's memories, which are not of its state dict: they are saved in folders of their own. While there are any,
    the model's own weights are frozen as far as nobody unfreezes them; a model with adapters has done so itself."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        adapts = hasattr(model, "peft_config")
        self._trained = [] if adapts else [weight for weight in model.parameters() if weight.requires_grad]
        for weight in self._trained:
            weight.requires_grad_(False)
        begin_saving_memories(model)
        self._quantizer = getattr(model, "hf_quantizer", None)
        if self._quantizer is not None:
            self._quantizer.__class__ = _trained_beside(type(self._quantizer))

    def remove(self, name: str, model: PreTrainedModel) -> None:
        """Forget a memory; with the last one, give the model back."""
        del self[name]
        if not len(self):
            end_saving_memories(model)
            delattr(model, ATTRIBUTE)
            if self._quantizer is not None:
                self._quantizer.__class__ = type(self._quantizer).__base__
            for weight in self._trained:
                weight.requires_grad_(True)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Nothing."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


def _trained_beside(quantizer: type) -> type:
    """A quantiser's class, which tells a ``Trainer`` that there is something to train beside the quantised weights:
    it asks for nothing else, and sees adapters of ``peft`` alone."""
    return type(quantizer.__name__, (quantizer,), {"is_qat_trainable": True})
