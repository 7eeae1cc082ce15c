"""Tables divided over ranks train as one table does: real processes, gloo between them."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ranks import run_ranks
from torch_engram.addressing import CanonicalVocab
from torch_engram.config import EngramConfig
from torch_engram.memory import MemoryBank, Tokens, WorkingSet
from torch_engram.optim import ROW_OPTIMIZERS
from torch_engram.stores import make_keys

STEPS = 8
FIELDS: dict[str, Any] = dict(
    layers=(1, 3), hidden=8, vocab_size=60, max_ngram=3, heads=(1, 2), row_dim=(3, 5), rows_per_head=13, init_std=0.5,
)  # fmt: skip


def make(optimizer: str = "adam", **options: Any) -> MemoryBank:
    vocab = CanonicalVocab(torch.arange(60), "tokenizer")
    return MemoryBank(
        EngramConfig.from_dict(FIELDS), vocab, optimizer=lambda p: ROW_OPTIMIZERS[optimizer](p, lr=0.05), **options
    )


def batch(step: int, rank: int) -> list[Tokens]:
    """Few distinct tokens, so that ranks and steps share most rows; now and then a rank reads nothing."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    shape = 2, 3 + (step + rank) % 4
    micro = [torch.randint(2, 4 + step % 9, shape, generator=generator) for _ in range(2)]
    dead = torch.zeros(shape, dtype=torch.bool)
    return [Tokens(part, live=dead if (step + rank) % 5 == 4 else None) for part in micro]


def backward(step: WorkingSet, scale: float, micros: range) -> list[Tensor]:
    seen = []
    for micro in micros:
        for layer in (1, 3):
            embeddings = step[micro].wait(layer)["engram"]
            seen.append(embeddings.detach().clone())
            ((embeddings - 0.3).square().sum() * scale).backward()
    return seen


def held(bank: MemoryBank) -> list[Tensor]:
    """Every table's records that this rank holds."""
    bank.flush()
    shard = bank.shard
    rows = [torch.arange(t.rows) if shard is None else shard.of(0, t.rows) for t in bank.tables]
    return [
        bank.source(table).store.fetch(make_keys(table.space, own))
        for table, own in zip(bank.tables, rows, strict=True)
    ]


def train_rank(depth: int, options: dict[str, Any]) -> dict[str, list[Tensor]]:
    rank = dist.get_rank()
    bank = make(group=dist.group.WORLD, **options)
    seen, norms, reads = [], [], []
    ahead: deque[WorkingSet] = deque()
    for number in range(STEPS):
        while len(ahead) <= depth and number + len(ahead) < STEPS:
            ahead.append(bank.prefetch(*batch(number + len(ahead), rank)))
        step = ahead.popleft()
        seen += backward(step, 1.0, range(2))
        step.reduce()
        norms.append(step.norm())
        step.apply(0.5)
        if number % 4 == 1:
            reads.append(bank.read(batch(number - 1, 0)[0]).wait(3)["engram"].clone())
    bank.prefetch(*batch(0, rank)).discard()
    return {"seen": seen, "norms": norms, "reads": reads, "held": held(bank)}


def train_all(cases: list[tuple[int, dict[str, Any]]]) -> list[dict[str, list[Tensor]]]:
    return [train_rank(depth, options) for depth, options in cases]


def train_alone(ranks: int, **options: Any) -> dict[str, list[Tensor]]:
    """One process that reads what all ranks do: their mean is a sum with shares."""
    bank = make(**options)
    seen: list[Tensor] = []
    norms, reads = [], []
    for number in range(STEPS):
        step = bank.prefetch(*[micro for rank in range(ranks) for micro in batch(number, rank)])
        seen += backward(step, 1 / ranks, range(2 * ranks))
        step.reduce()
        norms.append(step.norm())
        step.apply(0.5)
        if number % 4 == 1:
            reads.append(bank.read(batch(number - 1, 0)[0]).wait(3)["engram"].clone())
    return {"seen": seen, "norms": norms, "reads": reads, "held": held(bank)}


def same(left: dict[str, list[Tensor]], right: dict[str, list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for key in left for a, b in zip(left[key], right[key], strict=True))


CASES: list[tuple[int, dict[str, Any]]] = [
    (0, {}), (3, {"placement": "host"}), (2, {"placement": "host", "cache": 20_000}),
    (0, {"optimizer": "rowwise_adam", "codec": "bf16"}), (2, {"optimizer": "rowwise_adam", "codec": "bf16"}),
]  # fmt: skip


RANKS = 3
"""More than heads, and no divisor of a table's rows."""


def train_all_and_give_up(cases: list[tuple[int, dict[str, Any]]], bad: int) -> tuple[list[Any], tuple[str, Any]]:
    return train_all(cases), give_up_once(bad)


@pytest.fixture(scope="module")
def by_ranks() -> list[Any]:
    """What each rank did; they are started once."""
    return run_ranks(RANKS, train_all_and_give_up, CASES, 1)


def test_tables_divided_over_ranks_train_as_one_does(by_ranks: list[Any]) -> None:
    ranks, every = RANKS, [rank[0] for rank in by_ranks]
    for rank in every:
        assert all(same(rank[0], other) for other in rank[1:3])  # at any depth and placement, bit for bit
        assert same(rank[3], rank[4])
    for case in (0, 3):
        alone, runs = train_alone(ranks, **CASES[case][1]), [rank[case] for rank in every]
        close = dict(rtol=1e-4, atol=1e-5) if case == 0 else dict(rtol=2e-2, atol=2e-2)  # bf16 is rounded by luck
        for number, (mine, theirs) in enumerate(zip(_by_step(runs, "seen"), alone["seen"], strict=True)):
            torch.testing.assert_close(mine, theirs, **close, msg=lambda text, n=number: f"wait {n}: {text}")
        for run in runs:
            torch.testing.assert_close(torch.stack(run["norms"]), torch.stack(alone["norms"]), **close)
            torch.testing.assert_close(torch.stack(run["reads"]), torch.stack(alone["reads"]), **close)
        if case == 0:
            for table, whole in enumerate(alone["held"]):
                for rank, run in enumerate(runs):
                    mine, theirs = run["held"][table].view(torch.float32), whole[rank::ranks].view(torch.float32)
                    torch.testing.assert_close(mine, theirs, **close)


def give_up_once(bad: int) -> tuple[str, list[Tensor]]:
    """What a step is refused with in which rank ``bad`` has a token that is in no vocabulary, and then the run."""
    rank = dist.get_rank()
    bank = make(group=dist.group.WORLD)
    ahead = [bank.prefetch(*batch(0, rank))]
    ahead.append(bank.prefetch(torch.tensor([[99]])) if rank == bad else bank.prefetch(*batch(7, rank)))
    ahead.append(bank.prefetch(*batch(1, rank)))
    with pytest.raises(ValueError) as refused:
        ahead.pop(1)[0].wait(1)
    seen = []
    for step in ahead:
        seen += backward(step, 1.0, range(2))
        step.reduce()
        step.apply()
    return str(refused.value), [*seen, *held(bank)]


def test_a_rank_that_gives_a_step_up_tells_all_and_no_later_one_is_spoilt(by_ranks: list[Any]) -> None:
    (told, run), (why, _), (also, _) = [rank[1] for rank in by_ranks]
    assert told == also == "Rank 1 found no rows for this step, and says why where it runs." and "99" in why
    bank, seen = make(), []
    for number in range(2):
        step = bank.prefetch(*[micro for rank in range(RANKS) for micro in batch(number, rank)])
        seen += backward(step, 1 / RANKS, range(2 * RANKS))[:4]  # those of rank 0
        step.reduce()
        step.apply()
    expected = [*seen, *(rows[::RANKS] for rows in held(bank))]
    for mine, theirs in zip(run, expected, strict=True):
        exact = mine.view(torch.float32), theirs.view(torch.float32)
        torch.testing.assert_close(*exact, rtol=1e-4, atol=1e-5)


def _by_step(runs: list[dict[str, list[Tensor]]], what: str) -> list[Tensor]:
    """In the order in which one process reads them: a step's micro-batches, rank after rank."""
    per_step = len(runs[0][what]) // STEPS
    return [one for step in range(STEPS) for run in runs for one in run[what][step * per_step : (step + 1) * per_step]]
