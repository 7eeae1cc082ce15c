"""Gate maps: how far each memory is let in at every token of a text.

A gate near 0 keeps what the tables hold for the n-gram out of the residual stream, a gate near 1 lets it in
(arXiv 2601.07372, section 2.3). Shapes: T tokens, M residual branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from torch_engram.analysis.token_text import token_texts
from torch_engram.memory import MemoryBank, Tokens, join
from torch_engram.models import Decoder


@dataclass(frozen=True)
class GateMap:
    """The gates of one text."""

    text: str
    ids: tuple[int, ...]
    """T raw token ids."""
    tokens: tuple[str, ...]
    """T texts; empty for a token that only begins a character (:func:`token_texts`)."""
    gates: dict[tuple[str, int], Tensor]
    """Gates fp32 ``[T, M]`` in 0..1, on the CPU, by (memory, layer)."""


def gate_map(
    decoder: Decoder, banks: Mapping[str, MemoryBank], tokenizer: Tokenizer, text: str, *, dtype: str = "fp32"
) -> GateMap:
    """The gates of ``text``, read as a document of its own. ``dtype``: ``fp32`` or ``bf16``, as the model was trained.

    Raises ``ValueError`` for a model without memory, and for a text without a token.
    """
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise ValueError(f"The text {text!r} has no token: give one with at least one character.")
    return GateMap(text, tuple(ids), tuple(token_texts(tokenizer, ids)), read_gates(decoder, banks, ids, dtype=dtype))


@torch.no_grad()
def read_gates(
    decoder: Decoder, banks: Mapping[str, MemoryBank], ids: Sequence[int], *, dtype: str = "fp32"
) -> dict[tuple[str, int], Tensor]:
    """The gates fp32 ``[T, M]`` of raw token ids, one document, by (memory, layer).

    Raises ``ValueError`` for a model without memory, or with gates that are not finite.
    """
    if not banks:
        raise ValueError("This model has no memory, so it has no gates: give a checkpoint that was trained with one.")
    device = decoder.embedding.weight.device
    tokens = torch.tensor([list(ids)])
    memory = join(*(bank.read(Tokens(tokens)) for bank in banks.values()))
    was_training = decoder.training
    decoder.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            _, gates = decoder(tokens.to(device), memory, return_gates=True)
    finally:
        decoder.train(was_training)
    if not all(gate.isfinite().all() for gate in gates.values()):
        raise ValueError("The gates are not finite: the model's training went astray, so use an earlier checkpoint.")
    return {place: gate[0].float().cpu() for place, gate in gates.items()}
