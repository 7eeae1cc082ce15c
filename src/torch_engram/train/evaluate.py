"""Validation: the mean loss of a model with its memory on held-out text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torch_engram.data import IGNORE_INDEX, Batch, PackedBatches, TokenFile
from torch_engram.memory import Memory, MemoryBank, Tokens, join
from torch_engram.models import Decoder
from torch_engram.train.loss import head_losses


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
) -> Score:
    """The score on a token file: its first ``batches`` batches in the file's order, all by default."""
    was_training = decoder.training
    decoder.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    for batch in itertools.islice(PackedBatches(file, batch_size, seq_len).in_order(), batches):
        on_device = batch.to(device)
        memory = read_memory(banks, batch)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            hidden = decoder(on_device.tokens, memory, doc_start=on_device.doc_start, return_hidden=True)
            losses = head_losses(hidden, decoder.head.weight, on_device.targets, decoder.pad_bias)
        total += losses.sum(dtype=torch.float64)
        count += int((batch.targets != IGNORE_INDEX).sum())
    decoder.train(was_training)
    nats = total.item() / max(1, count)
    return Score(nats, count, nats / math.log(2) * len(file) / file.text_bytes)
