"""Validation: the mean loss of a model with its memory on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat

import torch
from torch import Tensor

from torch_engram.data import IGNORE_INDEX, Batch, PackedBatches, TokenFile
from torch_engram.memory import Memory, MemoryBank, Tokens, join
from torch_engram.models import Decoder
from torch_engram.train.loss import head_losses
from torch_engram.train.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Score:
    """A mean loss, and what it was taken over."""

    nats: float
    """Nats a predicted token."""
    tokens: int
    """Predicted tokens."""
    bits_per_byte: float
    """Nats a token in bits, over the split's bytes a token."""


def read_memory(banks: Mapping[str, MemoryBank], batch: Batch) -> Memory | None:
    """The memory of a batch for a forward without training; None for a model without memories."""
    tokens = Tokens(batch.tokens, doc_start=batch.doc_start)
    return join(*(bank.read(tokens) for bank in banks.values())) if banks else None


@torch.no_grad()
def evaluate(
    decoder: Decoder,
    banks: Mapping[str, MemoryBank],
    file: TokenFile,
    *,
    batch_size: int,
    seq_len: int,
    device: str = "cpu",
    dtype: str = "fp32",
    batches: int | None = None,
    ranks: Ranks = ALONE,
) -> Score:
    """The score on a token file: its first ``batches`` batches in the file's order, all by default.

    ``ranks`` share the batches, and all return the score of all.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    there = _share(PackedBatches(file, batch_size, seq_len), batches, ranks)
    for batch, losses in token_losses(decoder, banks, there, device=device, dtype=dtype):
        total += losses.sum(dtype=torch.float64)
        count += int((batch.targets != IGNORE_INDEX).sum())
    ranks.part_again(decoder)
    count = int(ranks.sum(torch.tensor(count)))
    nats = ranks.sum(total).item() / max(1, count)
    return Score(nats, count, nats / math.log(2) * len(file) / file.text_bytes)


@torch.no_grad()
def token_losses(
    decoder: Decoder, banks: Mapping[str, MemoryBank], batches: Iterable[Batch], *, device: str, dtype: str
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch and its tokens' losses in nats, fp32 ``[B, T]`` on the device; 0 where there is no target."""
    was_training = decoder.training
    decoder.eval()
    for batch in batches:
        on_device = batch.to(device)
        memory = read_memory(banks, batch)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            hidden = decoder(on_device.tokens, memory, doc_start=on_device.doc_start, return_hidden=True)
            losses = head_losses(hidden, decoder.head.weight, on_device.targets, decoder.pad_bias)
        yield batch, losses
    decoder.train(was_training)


def _share(data: PackedBatches, batches: int | None, ranks: Ranks) -> Iterator[Batch]:
    """Of the first ``batches`` batches those of this rank. All ranks read as often, for they read together: where one
    has none left, it reads the file's first batch without targets."""
    there = -(-data.windows // data.batch_size)
    wanted = there if batches is None else min(batches, there)
    mine = islice(data.in_order(ranks.rank, ranks.size), len(range(ranks.rank, wanted, ranks.size)))
    rounds = -(-wanted // ranks.size)
    for batch in islice(chain(mine, repeat(None)), rounds):
        if batch is None:
            batch = next(data.in_order())
            batch = replace(batch, targets=torch.full_like(batch.targets, IGNORE_INDEX))
        yield batch
