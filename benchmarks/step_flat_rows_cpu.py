"""step-flat-rows-cpu: the time of a training step must follow the rows that it touches and not the table.

One model twice, with 1 M and with 10 M rows, trained in turn on the same random tokens. Every step touches 16 rows a
token, almost all distinct in both (the smaller table has some 1 % more collisions, so it has the lighter step). The
tables' pages are touched beforehand: the memory's first use is not what is measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from record import record

from torch_engram.addressing import CanonicalVocab
from torch_engram.bench.results import quantiles
from torch_engram.config import EngramConfig
from torch_engram.memory import MemoryBank
from torch_engram.models import Decoder, DecoderConfig
from torch_engram.optim import RowwiseAdam
from torch_engram.stores import DeviceStore

VOCAB, HEADS, ROW_DIM, WARM_UP, REPEATS = 8192, 8, 32, 5, 61
SHAPE = (4, 256)


@dataclass
class Run:
    """One model with its memory, and the seconds that its steps and lookups took."""

    decoder: Decoder
    bank: MemoryBank
    optimizer: torch.optim.Optimizer
    steps: list[float]
    lookups: list[float]


def build(rows: int) -> Run:
    """The fixed model over a table of about ``rows`` rows."""
    engram = EngramConfig(
        layers=(1,), hidden=128, vocab_size=VOCAB, heads=HEADS, row_dim=ROW_DIM, rows_per_head=rows // (2 * HEADS)
    )
    torch.manual_seed(0)
    decoder = Decoder(
        DecoderConfig(vocab_size=VOCAB, hidden=128, layers=4, heads=4, ffn_hidden=384, engrams={"engram": engram})
    )
    bank = MemoryBank(engram, CanonicalVocab(torch.arange(VOCAB), "synthetic"), optimizer=RowwiseAdam)
    store = bank.source(bank.tables[0]).store
    assert isinstance(store, DeviceStore)
    store.table.records.zero_()
    return Run(decoder, bank, torch.optim.AdamW(decoder.parameters(), 1e-3), [], [])


def step(run: Run, tokens: torch.Tensor) -> None:
    """One whole training step, its lookup included."""
    start = time.perf_counter()
    rows = run.bank.prefetch(tokens)
    logits = run.decoder(tokens, rows[0])
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    rows.reduce()
    torch.nn.utils.clip_grad_norm_([*run.decoder.parameters(), *run.bank.parameters()], 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    rows.apply()
    run.steps.append(time.perf_counter() - start)


def lookup(run: Run, tokens: torch.Tensor) -> None:
    """What a step does besides the network: addressing, fetch, expansion, merge, row optimiser, write."""
    start = time.perf_counter()
    rows = run.bank.prefetch(tokens)
    embeddings = rows[0].wait(1)["engram"]
    embeddings.sum().backward()
    rows.reduce()
    rows.apply()
    run.lookups.append(time.perf_counter() - start)


def main() -> None:
    torch.set_num_threads(1)
    small, large = build(1_000_000), build(10_000_000)
    for number in range(WARM_UP + REPEATS):
        tokens = torch.randint(VOCAB, SHAPE)
        for run in (small, large) if number % 2 else (large, small):
            step(run, tokens)
            lookup(run, tokens)
    for kind in ("steps", "lookups"):
        times = {name: getattr(run, kind)[WARM_UP:] for name, run in (("1M", small), ("10M", large))}
        median = {name: quantiles(seconds)[1] for name, seconds in times.items()}
        case = kind.removesuffix("s")
        for name, seconds in times.items():
            ratio = median[name] / median["1M"]
            record("step-flat-rows-cpu", f"{case}-{name}-rows", seconds, "s", reference=median["1M"], ratio=ratio)
        if kind == "steps":
            ratios = [b / a for a, b in zip(times["1M"], times["10M"], strict=True)]
            ratio = quantiles(ratios)[1]
            record("step-flat-rows-cpu", "10M-over-1M-rows", ratios, "times", reference=1.0, ratio=ratio)


if __name__ == "__main__":
    main()
