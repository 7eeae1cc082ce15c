"""A model whose layers can be read: a run's checkpoint, or a causal model of transformers, each with its memories.

A state is what a block hands on, before any norm: state 0 is the embedding, state l what l blocks have made of it.
Shapes: L blocks, B sequences, T tokens, M residual branches, d width of a state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_engram.config import EngramConfig
from torch_engram.data import IGNORE_INDEX, Batch, load_tokenizer
from torch_engram.memory import MemoryBank
from torch_engram.models import Decoder
from torch_engram.train import open_checkpoint
from torch_engram.train.checkpoint import latest_checkpoint
from torch_engram.train.evaluate import read_memory


class Subject(Protocol):
    """What an instrument asks of a model, all of it without gradients."""

    tokenizer: Tokenizer

    @property
    def has_memory(self) -> bool:
        """Whether :meth:`disabled` changes anything."""

    def states(self, batch: Batch) -> Tensor:
        """All states of a batch, fp32 ``[L + 1, B, T, d]``."""

    def logits(self, states: Tensor) -> Tensor:
        """What the model's last norm and its head make of states ``[n, d]`` of any layer: fp32 ``[n, V]``."""

    def disabled(self) -> AbstractContextManager[None]:
        """Within, the model runs as if it had no memory."""

    @property
    def engrams(self) -> dict[tuple[str, int], nn.Module]:
        """The module that adds a memory, by its name and block: called with streams and embeddings ``[B, T, E]``."""

    def config(self, name: str) -> EngramConfig:
        """Of a memory."""

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Of every target, in nats: fp32 ``[B, T]``, 0 where there is none. With a graph where gradients are on."""


def open_subject(path: Path, device: str = "cpu") -> Subject:
    """A trained model in fp32: of a run's folder or one of its checkpoints, or of a folder that transformers reads.

    Raises ``ValueError`` for a folder that is neither, where a file is damaged, or without the extra ``hf`` for the
    latter.
    """
    if (path / "checkpoint.json").exists() or latest_checkpoint(path) is not None:
        loaded = open_checkpoint(path, device)
        return DecoderSubject(loaded.decoder, loaded.banks, loaded.tokenizer)
    if (path / "config.json").exists():
        return _open_hub(path, device)
    raise ValueError(
        f"{path} is neither a run's folder with a checkpoint nor a model's with a config.json: give one of these."
    )


def _open_hub(path: Path, device: str) -> Subject:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from torch_engram.hub.loading import from_pretrained, no_model
        from torch_engram.hub.saved import FACTS, MEMORIES
    except ImportError as error:
        raise ValueError(str(error)) from error
    if any((path / MEMORIES).glob(f"*/{FACTS}")):
        model: Any = from_pretrained(path, dtype=torch.float32, device_map=device)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise no_model(str(path), error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise no_model(str(path), error) from error
    return HubSubject(model.to(device).eval(), load_tokenizer(tokenizer))


class DecoderSubject:
    """A decoder of this library. A state is the mean of the residual branches, which is what the last norm is given."""

    def __init__(self, decoder: Decoder, banks: Mapping[str, MemoryBank], tokenizer: Tokenizer):
        self.decoder, self.banks, self.tokenizer = decoder.eval(), banks, tokenizer

    @property
    def has_memory(self) -> bool:
        """Whether it has banks."""
        return bool(self.banks)

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """As of :class:`Subject`."""
        found: list[Tensor] = []
        there = batch.to(self.decoder.embedding.weight.device)
        with _watched(self.decoder.blocks, lambda streams: found.append(streams.float().mean(2))):
            self.decoder(there.tokens, read_memory(self.banks, batch), doc_start=there.doc_start, return_hidden=True)
        return torch.stack(found)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """As of :class:`Subject`."""
        return F.linear(self.decoder.norm(states), self.decoder.head.weight, self.decoder.pad_bias).float()

    @property
    def engrams(self) -> dict[tuple[str, int], nn.Module]:
        """As of :class:`Subject`."""
        names = self.decoder.config.engrams
        blocks = list(enumerate(self.decoder.blocks))
        return {(name, layer): block.get_submodule(f"engrams.{name}") for name, own in names.items()
                for layer, block in blocks if layer in own.layers}  # fmt: skip

    def config(self, name: str) -> EngramConfig:
        """As of :class:`Subject`."""
        return self.banks[name].config

    def log_probabilities(self, batch: Batch) -> Tensor:
        """As of :class:`Subject`."""
        there = batch.to(self.decoder.embedding.weight.device)
        logits = self.decoder(there.tokens, read_memory(self.banks, batch), doc_start=there.doc_start)
        return _of_targets(logits, there.targets)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, every Engram hands its streams on as they are (arXiv 2601.07372, section 6.3, suppresses it so)."""
        with silent(*self.engrams.values()):
            yield


class HubSubject:
    """A causal model of transformers. Where it has residual branches, a state is all of them side by side, d = M times
    the model's width, for models weigh them in ways of their own."""

    def __init__(self, model: Any, tokenizer: Tokenizer):
        from torch_engram.hub.attached import memories_of
        from torch_engram.hub.blocks import find_blocks

        self.model, self.tokenizer, self.memories = model, tokenizer, memories_of(model)
        own = next((memory.blocks for memory in self.memories.values()), None)
        self.blocks = find_blocks(model) if own is None else own

    @property
    def has_memory(self) -> bool:
        """Whether memories are attached."""
        return bool(self.memories)

    @property
    def engrams(self) -> dict[tuple[str, int], nn.Module]:
        """As of :class:`Subject`."""
        memories = self.memories.items()
        return {(name, int(layer)): engram for name, own in memories for layer, engram in own.engrams.items()}

    def config(self, name: str) -> EngramConfig:
        """As of :class:`Subject`."""
        config: EngramConfig = self.memories[name].bank.config
        return config

    def log_probabilities(self, batch: Batch) -> Tensor:
        """As of :class:`Subject`. Documents are kept apart as in :meth:`states`."""
        there = batch.to(self.model.device)
        return _of_targets(self.model(**_documents(there), use_cache=False).logits, there.targets)

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """As of :class:`Subject`. Documents are kept apart by their positions, which begin at 0 in each."""
        found: list[Tensor] = []
        with _watched(self.blocks.all, lambda hidden: found.append(hidden.float().flatten(2))):
            self.blocks.owner(**_documents(batch.to(self.model.device)), use_cache=False)
        return torch.stack(found)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """As of :class:`Subject`: by the model's own forward, in which blocks hand on these states, each a sequence of
        one token. So norms, branches, caps and scales are what the model makes them."""
        branches = () if self.blocks.branches == 1 else (self.blocks.branches,)
        handed = states.view(len(states), 1, *branches, self.blocks.hidden)
        ids = torch.zeros(len(states), 1, dtype=torch.int64, device=states.device)
        with self.disabled(), _standing_in(self.blocks.all, (handed,) if self._gives_tuples else handed):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[:, 0].float()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, all memories are disabled."""
        with ExitStack() as off:
            for memory in self.memories.values():
                off.enter_context(memory.disabled())
            yield

    @cached_property
    def _gives_tuples(self) -> bool:
        """Whether a block's result is a tuple that begins with the hidden states."""
        results: list[Any] = []
        hook = self.blocks.all[-1].register_forward_hook(lambda _, args, result: results.append(result))
        with self.disabled():
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.model.device), use_cache=False)
        hook.remove()
        return isinstance(results[0], tuple)


def _documents(batch: Batch) -> dict[str, Tensor]:
    """What a model of transformers is told of a batch."""
    places = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    begins = (places * batch.doc_start).cummax(1).values
    return {"input_ids": batch.tokens, "position_ids": places - begins}


def _of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities ``[B, T]`` out of logits ``[B, T, V]``."""
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -losses.view_as(targets)


@contextmanager
def silent(*engrams: nn.Module) -> Iterator[None]:
    """Within, these modules hand their streams on as they are."""

    def pass_on(_: nn.Module, args: tuple[Tensor, Tensor], output: Any) -> Any:
        return args[0] if isinstance(output, Tensor) else (args[0], output[1])

    with _held(*(engram.register_forward_hook(pass_on) for engram in engrams)):
        yield


@contextmanager
def _held(*hooks: RemovableHandle) -> Iterator[None]:
    """Within, hooks are on."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _watched(blocks: nn.ModuleList, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Within, ``see`` is given what enters the first block, before a memory is added to it, and what each hands on."""

    def enters(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        see(args[0] if args else named["hidden_states"])

    def leaves(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        see(result if isinstance(result, Tensor) else result[0])

    first = blocks[0].register_forward_pre_hook(enters, with_kwargs=True, prepend=True)
    with _held(first, *(block.register_forward_hook(leaves) for block in blocks)):
        yield


@contextmanager
def _standing_in(blocks: nn.ModuleList, result: Any) -> Iterator[None]:
    """Within, blocks compute nothing and give ``result``."""
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        vars(block)["forward"] = lambda *_, **__: result
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward
