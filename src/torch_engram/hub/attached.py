"""A memory on a causal model of transformers: the model's own forward reads it, and its training loop trains it.

Three hooks do it. Where the decoder begins, its tokens are known: rows are asked for there. At the entry of each chosen
block, outside what is recomputed in a backward, the looked-up rows are added to the hidden states. Where the decoder
ends, what decoding has to remember goes with the cache. Nothing else of the model is changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from torch_engram.fusion import Engram
from torch_engram.hub.blocks import Blocks
from torch_engram.hub.cache_state import DRAFTS, MemoryState, cache_among, states_of
from torch_engram.hub.peers import peers_of
from torch_engram.hub.row_steps import Backward, RowSteps
from torch_engram.hub.tokens import arguments_of, tokens_of
from torch_engram.memory import JoinedOptimizer, Memory, MemoryBank, Tokens

ATTRIBUTE = "engram_memories"
"""Where a model keeps its memories, by name."""


class Attached(nn.Module):
    """One memory on one model: its modules by block, its rows in ``bank``. Made by :func:`attach`."""

    bank: MemoryBank
    blocks: Blocks
    _model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, blocks: Blocks, bank: MemoryBank):
        super().__init__()
        config, weight = bank.config, embedding_of(model)
        self.engrams = nn.ModuleDict({str(layer): Engram(config) for layer in config.layers})
        self.engrams.to(weight.device, weight.dtype)
        self.rows = _Rows(bank.parameters() if bank.optimizer is not None else [])
        vars(self).update(bank=bank, blocks=blocks, _model=model)  # past nn.Module: a model is no part of its memory
        self.enabled = True
        self._vocab_size = len(weight)
        self._steps = RowSteps(bank)
        self._calls = threading.local()
        """Of each thread: the forward that is under way, and the backward that is to follow."""
        self._hooks = [
            blocks.owner.register_forward_pre_hook(self._enter, with_kwargs=True),
            blocks.owner.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
            *(
                blocks.all[layer].register_forward_pre_hook(partial(self._add, str(layer)), with_kwargs=True)
                for layer in config.layers
            ),
        ]

    @property
    def name(self) -> str:
        """Of the memory, on its model and in its folder."""
        return self.bank.name

    @property
    def place(self) -> int:
        """Among the model's memories: later ones of a block see the hidden states with earlier ones in them."""
        return list(memories_of(self._model)).index(self.name)

    def detach(self) -> None:
        """Give the model back as it was before this memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if memories_of(self._model).get(self.name) is self:
            getattr(self._model, ATTRIBUTE).remove(self.name, self._model)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, the model runs as if it had no such memory."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def only_at(self, positions: Tensor) -> Iterator[None]:
        """Within, rows are read, and taught, at ``positions`` alone, bool ``[B, T]``; all others are zero.

        A row that was never taught adds nothing. So what is taught at a name's tokens is found again whatever words
        stand around it, and the phrases around it stay as they were. Rows elsewhere count as read, with a gradient of
        zero: by an optimiser with momentum, those that were taught before still move. A forward raises ``ValueError``
        where there are more or fewer positions than tokens.
        """

        def keep(embeddings: Tensor) -> Tensor:
            if positions.shape != embeddings.shape[:2]:
                raise ValueError(
                    f"only_at() was given positions of shape {tuple(positions.shape)}, and the tokens are of shape "
                    f"{tuple(embeddings.shape[:2])}: give one for each token."
                )
            return positions[..., None]

        with self._reading_only(keep):
            yield

    @contextmanager
    def only_taught(self) -> Iterator[None]:
        """Within, numbers of rows that are still zero have no gradient; what is read stays as it is.

        For text that a memory shall leave alone: what was taught elsewhere, and the memory's modules, learn to be
        silent here, and the text's own rows stay empty.
        """
        with self._reading_only(lambda embeddings: embeddings != 0):
            yield

    @contextmanager
    def _reading_only(self, kept: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within, of rows ``[B, T, ...]`` that are read, what is not ``kept`` is zero and has no gradient."""

        def mask(module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            streams, embeddings = args
            return streams, embeddings * kept(embeddings).to(embeddings)

        hooks = [engram.register_forward_pre_hook(mask) for engram in self.engrams.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def optimizer(self, lr: float = 1e-3, weight_decay: float = 0.0) -> JoinedOptimizer:
        """One optimiser of the bank's rows, at the rate of their own optimiser, and of all of the model's weights that
        are trained, by AdamW: for a ``Trainer``, as ``optimizers=(memory.optimizer(), None)``. After
        ``memory.engrams.requires_grad_(False)`` these are none of the memory's own: its rows are trained alone."""
        rows = set(self.rows.parameters())
        trained = [each for each in self._model.parameters() if each.requires_grad and each not in rows]
        networks = [AdamW(trained, lr=lr, weight_decay=weight_decay)] if trained else []
        return JoinedOptimizer(*networks, self.bank)

    def extra_repr(self) -> str:
        """The memory's name and blocks."""
        return f"{self.name}: blocks {', '.join(map(str, self.bank.config.layers))} of {self.blocks.path}"

    # -- in a forward -------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, owner: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._calls.now, backward = None, self._expect_backward()
        self._calls.backward = backward
        if not self.enabled:
            return
        given = arguments_of(owner, args, named)
        self._require_unchanged()
        state, past = self._state(given)
        tokens = tokens_of(given, past)
        if state is not None:
            tokens = Tokens(tokens.ids, tokens.doc_start, tokens.live, state.history)
            state.seen += tokens.ids.shape[1]
        memory = self.bank.read(tokens) if backward is None or not owner.training else backward.read(tokens)
        self._calls.now = _Call(memory, tokens, state)

    def _expect_backward(self) -> Backward | None:
        """Of this forward, where rows are trained; other ranks may read, and train, what this one does not."""
        if not torch.is_grad_enabled():
            return None
        peers = peers_of(self.name, next(self.engrams.parameters()))
        return None if self.bank.optimizer is None else self._steps.follow(peers)

    def _state(self, given: dict[str, Any]) -> tuple[MemoryState | None, int | None]:
        """What a cache remembers for this memory, and the positions that it holds."""
        cache = cache_among(given)
        wants_cache = given.get("use_cache")
        wants_cache = getattr(self._model.config, "use_cache", False) if wants_cache is None else wants_cache
        if cache is None:
            return (self._new_state(), None) if wants_cache and not torch.is_grad_enabled() else (None, None)
        states, past = states_of(cache), int(cache.get_seq_length())
        if self.name not in states and not past:
            states[self.name] = self._new_state()
        state = states.get(self.name)
        if state is None or state.seen != past:
            seen = 0 if state is None else state.seen
            raise ValueError(
                f"This cache holds {past} positions, and memory {self.name!r} has seen {seen} of them: begin with an "
                "empty cache."
            )
        return state, past

    def _new_state(self) -> MemoryState:
        layers = {int(layer): engram.new_state(DRAFTS) for layer, engram in self.engrams.items()}  # type: ignore[operator]
        return MemoryState(self.bank.new_history(DRAFTS), layers)

    def _require_unchanged(self) -> None:
        weight = embedding_of(self._model)
        if len(weight) != self._vocab_size:
            raise ValueError(
                f"The model's vocabulary was resized from {self._vocab_size} to {len(weight)} ids after memory "
                f"{self.name!r} was attached: detach it, and attach it with the new tokenizer."
            )
        if weight.device != self.bank.device:
            raise ValueError(
                f"The model is on {weight.device}, and memory {self.name!r} on {self.bank.device}: move the model "
                "before the memory is attached."
            )

    def _add(
        self, layer: str, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The memory into the hidden states ``[B, T, d]``, or streams ``[B, T, M, d]``, at a block's entry."""
        call: _Call | None = getattr(self._calls, "now", None)
        if call is None:  # disabled, or a block that is called by itself
            return None
        hidden = args[0] if args else named["hidden_states"]
        streams = hidden if hidden.dim() == 4 else hidden.unsqueeze(2)
        fuse = _fuse if call.state is None else _fuse_remembering
        added = fuse(self.engrams[layer], streams, call, layer, self.name).view_as(hidden)
        return ((added, *args[1:]), named) if args else (args, {**named, "hidden_states": added})

    def _leave(self, owner: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        call: _Call | None = getattr(self._calls, "now", None)
        if output is not None:
            self._follow(output)
        self._calls.now = self._calls.backward = None
        if call is not None and call.state is not None:
            cache = cache_among(vars(output)) if isinstance(output, ModelOutput) else None
            if cache is not None:
                states_of(cache).setdefault(self.name, call.state)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _follow(self, output: Any) -> None:
        backward: Backward | None = getattr(self._calls, "backward", None)
        if backward is not None:
            backward.begins_at(output)


@dataclass(frozen=True)
class _Call:
    """One forward."""

    memory: Memory
    tokens: Tokens
    state: MemoryState | None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _wait(memory: Memory, layer: str, name: str) -> Tensor:
    return memory.wait(int(layer))[name]


def _fuse(engram: nn.Module, streams: Tensor, call: _Call, layer: str, name: str) -> Tensor:
    embeddings, tokens = _wait(call.memory, layer, name), call.tokens
    state = None if call.state is None else call.state.layers[int(layer)]
    added: Tensor = engram(streams, embeddings, live=tokens.live, doc_start=tokens.doc_start, state=state)
    return added


_fuse_remembering = torch.compiler.disable(_fuse)
"""In decoding: what is remembered moves in Python, and would be compiled anew as it does."""


def embedding_of(model: PreTrainedModel) -> Tensor:
    """The input embedding's weight ``[V, d]``."""
    weight: Any = model.get_input_embeddings().weight
    return cast(Tensor, weight)


class _Rows(nn.Module):
    """A bank's proxies among a model's parameters, where clipping finds them: saved with the bank, moved nowhere.

    ``DistributedDataParallel``, which asks each module for parameters of its own, gets none: their gradients come from
    no backward, and ranks average them otherwise."""

    def __init__(self, proxies: list[nn.Parameter]):
        super().__init__()
        for number, proxy in enumerate(proxies):
            self.register_parameter(str(number), proxy)

    def _apply(self, fn: Any, recurse: bool = True) -> _Rows:
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All of them, but no module's own."""
        return super().named_parameters(prefix, recurse, remove_duplicate) if recurse else iter(())


def memories_of(model: nn.Module) -> Mapping[str, Attached]:
    """The memories on a model, by name."""
    return dict(getattr(model, ATTRIBUTE, nn.ModuleDict()).items())  # type: ignore[arg-type]
