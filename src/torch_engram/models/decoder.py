"""The reference decoder: tokens and their memory in, logits out.

Memory travels with the call: what ``memory.wait(layer)`` hands over is passed to the block as an argument, outside
what is compiled or recomputed. Shapes: B batch, T tokens, V vocabulary, E embedding width, M branches, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_engram.fusion import Engram, require_fp8
from torch_engram.models.block import Block, BlockState
from torch_engram.models.config import DecoderConfig
from torch_engram.models.layout import SequenceState, find_places, lay_out
from torch_engram.models.moe import MoE
from torch_engram.models.norm import RMSNorm
from torch_engram.window import DecodeState, States

MASKED_LOGIT = -1e30
"""Logit of an id beyond the tokenizer: probability exactly 0, yet finite, so that p * log p stays a number."""


class Memory(Protocol):
    """What a decoder reads its looked-up rows from."""

    def wait(self, layer: int) -> dict[str, Tensor]:
        """The embeddings ``[B, T, E]`` of each memory that enters at ``layer``, by name; empty where none does."""


class DecoderState(States):
    """Everything that decoding remembers: places, keys and values, Engram states. A :class:`DecodeState`."""

    def __init__(self, blocks: list[BlockState]):
        self.sequences = SequenceState()
        self.blocks = blocks

    def __len__(self) -> int:
        """Positions held."""
        return len(self.sequences)

    def _parts(self) -> Iterator[DecodeState]:
        # Shortest windows first: they are the first to refuse a crop, and then nothing has been cropped yet.
        windows = [state for block in self.blocks for state in block.engrams.values()]
        yield from sorted(windows, key=lambda window: window.keep)
        yield from (block.kv for block in self.blocks)
        yield self.sequences


class Decoder(nn.Module):
    """A decoder-only language model with any number of named memories.

    ``recompute`` saves activation memory: blocks are run again in the backward pass, with identical gradients.
    ``fp8`` computes the Engrams' matrix products in FP8, as the property of that name does.
    """

    pad_bias: Tensor | None

    def __init__(self, config: DecoderConfig, *, recompute: bool = False, fp8: bool = False):
        super().__init__()
        self.config, self.recompute = config, recompute
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        pad_bias = None
        if config.real_vocab is not None:
            pad_bias = torch.zeros(config.vocab_size)
            pad_bias[config.real_vocab :] = MASKED_LOGIT
        self.register_buffer("pad_bias", pad_bias, persistent=False)
        # Small logits at the start, so that the first loss is ln V.
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.fp8 = fp8

    @property
    def fp8(self) -> bool:
        """Whether the Engrams multiply in FP8; to be set at any time, for it changes no parameter. Raises
        ``ValueError`` on a GPU without FP8."""
        return self._fp8

    @fp8.setter
    def fp8(self, fp8: bool) -> None:
        if fp8:
            require_fp8(self.embedding.weight.device)
        self._fp8 = fp8
        for module in self.modules():
            if isinstance(module, Engram):
                module.fp8 = fp8

    def forward(
        self,
        tokens: Tensor,
        memory: Memory | None = None,
        *,
        doc_start: Tensor | None = None,
        live: Tensor | None = None,
        state: DecoderState | None = None,
        return_gates: bool = False,
        return_hidden: bool = False,
    ) -> Tensor | tuple[Tensor, dict[tuple[str, int], Tensor]]:
        """Logits ``[B, T, V]``; with ``return_gates`` also the gates, fp32 ``[B, T, M]``, by (name, layer).

        With ``return_hidden`` not the logits but what the head makes them of: the normed hidden states ``[B, T, d]``.
        ``tokens`` is int64 ``[B, T]``. ``doc_start`` (bool ``[B, T]``) is True at a document's first position:
        nothing looks past it. Where ``live`` (bool ``[B, T]``) is False, as in left padding, a token is never
        looked at. ``state`` carries on from earlier calls and is advanced; no gradient flows through it.
        Raises ``ValueError`` where the memory does not fit the decoder's Engrams, or a state meets autograd.
        """
        if state is not None and torch.is_grad_enabled():
            raise ValueError("Decoding with a state records no gradient: wrap the call in torch.no_grad().")
        placement = find_places(tokens, doc_start, live, state.sequences if state is not None else None)
        assert self.config.head_dim is not None
        dtype = self.embedding.weight.dtype
        layout = lay_out(placement, tokens.shape[1], self.config.head_dim, self.config.rope_theta, dtype)
        embedded = self.embedding(tokens)
        if torch.is_autocast_enabled(tokens.device.type):  # the residual stream has its type, too
            embedded = embedded.to(torch.get_autocast_dtype(tokens.device.type))
        streams = embedded[:, :, None].expand(-1, -1, self.config.branches, -1)
        gates: dict[tuple[str, int], Tensor] = {}
        for layer, block in enumerate(self.blocks):
            embeddings = self._wait(memory, layer)
            block_state = state.blocks[layer] if state is not None else None
            streams, block_gates = self._run(block, streams, layout, embeddings, live, doc_start, block_state)
            gates.update({(name, layer): gate for name, gate in block_gates.items()})
        hidden = streams.squeeze(2) if self.config.branches == 1 else streams.mean(2)
        bias = None if self.pad_bias is None else self.pad_bias.to(hidden.dtype)
        normed = self.norm(hidden)
        result = normed if return_hidden else F.linear(normed, self.head.weight, bias)
        return (result, gates) if return_gates else result

    def _run(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if self.recompute and torch.is_grad_enabled():
            # Nothing in a block draws random numbers.
            run: tuple[Tensor, dict[str, Tensor]] = checkpoint(
                block, *inputs, use_reentrant=False, preserve_rng_state=False
            )
            return run
        run = block(*inputs)
        return run

    def _wait(self, memory: Memory | None, layer: int) -> dict[str, Tensor]:
        """The layer's embeddings, or ``ValueError`` for one too few or too many."""
        expected = self.config.engrams_at(layer)
        if memory is None:
            if expected:
                raise ValueError(
                    f"Layer {layer} of this decoder reads memory {next(iter(expected))!r}: pass memory=, "
                    f"as a memory bank makes it from the same tokens."
                )
            return {}
        embeddings = memory.wait(layer)
        for name in expected:
            if name not in embeddings:
                raise ValueError(
                    f"The memory given has no {name!r} for layer {layer}: make it for this decoder's engrams."
                )
        for name in embeddings:
            if name not in expected:
                raise ValueError(f"The memory given has {name!r} for layer {layer}, where no Engram is: leave it out.")
        return embeddings

    def new_state(self, drafts: int = 0) -> DecoderState:
        """An empty state for decoding, from which the last ``drafts`` positions can be taken back."""
        return DecoderState([block.new_state(drafts) for block in self._blocks()])

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place; ``options`` go to ``torch.compile``. Waiting for memory stays outside."""
        # All blocks of all decoders in a process share one function's cache, and eight kinds of block are soon met.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for block in self.blocks:
            # What is hooked to a block, such as FSDP's gathering of its parameters, runs outside the graph.
            setattr(block, "forward", torch.compile(block.forward, **{"fullgraph": True, **options}))  # noqa: B010

    def update_balance(self, rate: float) -> dict[int, Tensor]:
        """:meth:`MoE.update_balance` of every layer with experts; the largest load over the mean, by layer."""
        return {
            layer: block.ffn.update_balance(rate)
            for layer, block in enumerate(self._blocks())
            if isinstance(block.ffn, MoE)
        }

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block
