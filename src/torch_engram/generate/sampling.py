"""Tokens out of a model: cached decoding of a batch of prompts, greedy or sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torch_engram.memory import MemoryBank, Tokens, join
from torch_engram.models import Decoder


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Next tokens int64 ``[B]`` from logits ``[B, V]``: the likeliest at temperature 0, else drawn from the smallest
    set of tokens whose probability reaches ``top_p``."""
    if not logits.amax(dim=-1).isfinite().all():  # NaN passes through a maximum; ids that are masked do not
        raise ValueError("The model's logits are not finite: its training went astray, so use an earlier checkpoint.")
    if temperature == 0:
        return logits.argmax(dim=-1)
    behind = logits.float() - logits.float().amax(dim=-1, keepdim=True)  # so that no temperature makes infinities
    probability, token = (behind / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probability.cumsum(dim=-1) - probability
    kept = probability.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(kept, 1, generator=generator)
    return token.gather(1, drawn).squeeze(1)


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts as ids int64 ``[B, T]`` that end together, and bool ``[B, T]``: True where there is a token."""
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    live = torch.tensor([[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return ids, live


@torch.no_grad()
def generate(
    decoder: Decoder,
    banks: Mapping[str, MemoryBank],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    end_id: int | None = None,
) -> list[list[int]]:
    """Continuations of token prompts, without the prompts and without ``end_id``, where a sequence stops.

    Raises ``ValueError`` for an empty prompt or a setting out of range.
    """
    if not prompts or not all(prompts):
        raise ValueError("A prompt is empty: give at least one token to continue.")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError("Sampling needs a finite temperature >= 0, 0 < top_p <= 1 and at least one new token.")
    device = decoder.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    histories = {name: bank.new_history() for name, bank in banks.items()}
    state = decoder.new_state()
    ids, live = pad_left(prompts, pad=0)
    written: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        reads = [bank.read(Tokens(ids, live=live, history=histories[name])) for name, bank in banks.items()]
        logits = decoder(ids.to(device), join(*reads) if reads else None, live=live.to(device), state=state)
        assert isinstance(logits, Tensor)
        token = choose(logits[:, -1], temperature, top_p, generator).cpu()
        written.append(token)
        if end_id is not None:
            done |= token == end_id
            if done.all():
                break
        ids, live = token[:, None], torch.ones(len(prompts), 1, dtype=torch.bool)
    return [_until(row, end_id) for row in torch.stack(written, dim=1).tolist()]


def _until(tokens: list[int], end_id: int | None) -> list[int]:
    return tokens[: tokens.index(end_id)] if end_id in tokens else tokens
