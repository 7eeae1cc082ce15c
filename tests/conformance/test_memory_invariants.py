"""DESIGN's invariants of a memory: one trajectory bit for bit under every placement, prefetch depth and lag; gradients
of a dense embedding; documents packed as if alone; decoding equal to the whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_engram.memory import MemoryBank, Tokens
from torch_engram.optim import ROW_OPTIMIZERS, RowAdam, RowwiseAdam
from torch_engram.stores import WritableCachedStore, WritableStore, make_keys
from torch_engram.stores.slots import WAYS

Make = Callable[..., MemoryBank]
Run = Callable[..., list[float]]
Records = Callable[[MemoryBank], list[Tensor]]
STEPS = 50
BY_ORDER = dict(row_dim=(3, 5), heads=(2, 3))


def adversarial_batches(steps: int = STEPS) -> list[list[Tokens]]:
    """Few distinct tokens, so that rows come back after 1, 2, 3, .. steps; dead positions and document starts."""
    generator, batches = torch.Generator().manual_seed(5), []
    for number in range(steps):
        micro_batches = []
        for _ in range(1 + number % 2):
            shape = (1 + number % 3, 1 + number % 5)
            ids = torch.randint(2, 5 + number % 7, shape, generator=generator)
            masks = [torch.rand(shape, generator=generator) for _ in range(2)]
            micro_batches.append(Tokens(ids, doc_start=masks[0] < 0.2, live=masks[1] < 0.8 if number % 4 else None))
        batches.append(micro_batches)
    return batches


@pytest.fixture(scope="module")
def reference() -> dict[Any, Any]:
    return {}


ADAM, ROWWISE = ("adam", "bf16", False), ("rowwise_adam", "fp32", False)
OTHERS = [
    (("adagrad", "bf16", False), "host", 1),
    (("adagrad", "fp32", True), "late-7", 4),
    (("sinkhorn", "bf16", False), "late-7", 4),
    (("sinkhorn", "bf16", True), "host", 1),
]
EVERY = list(product((ADAM,), ("device", "host", "disk", "late-7"), (0, 1, 4)))
"""What a row optimiser keeps is one plane more or less of a record: one point a placement and a depth does for it."""


@pytest.mark.parametrize(
    "trained, where, depth",
    [
        *EVERY,
        *[(ROWWISE, "device", 1), (ROWWISE, "host", 4), (ROWWISE, "disk", 4), (ROWWISE, "late-7", 0)],
        *[(ADAM, "late-1", 4), *OTHERS],
    ],
)
def test_one_trajectory_bit_for_bit(
    make_bank: Make,
    train: Run,
    every_record: Records,
    stores: dict[str, Any],
    reference: dict[Any, Any],
    trained: tuple[str, str, bool],
    where: str,
    depth: int,
) -> None:
    optimizer, codec, lazy = trained
    settings = dict(weight_decay=0.5, lazy_decay=True) if lazy else {}

    def run(where: str, depth: int) -> tuple[list[float], list[Tensor]]:
        bank = make_bank(
            BY_ORDER,
            optimizer=lambda p: ROW_OPTIMIZERS[optimizer](p, lr=0.05, **settings),
            codec=codec,
            placement=stores[where],
        )
        return train(bank, adversarial_batches(), depth), every_record(bank)

    if trained not in reference:
        reference[trained] = run("device", 0)
    losses, records = run(where, depth)
    expected_losses, expected = reference[trained]
    assert losses == expected_losses
    assert losses[-1] != losses[-3]
    for mine, theirs in zip(records, expected, strict=True):
        assert torch.equal(mine, theirs)


def tiny(bank: MemoryBank, parts: int = 1) -> int:
    """The least budget of a cache in front of a bank like this: one set of entries of ``parts`` rows for each kind."""
    stores = {id(bank.source(table).store): bank.source(table).store for table in bank.tables}
    sets = len(bank.tables) * len(bank.config.orders) * len(stores)
    return sets * WAYS * (parts * max(store.layout.nbytes for store in stores.values()) + 12)


@pytest.mark.parametrize("times", [1, 50])
@pytest.mark.parametrize("where, depth", [("host", 0), ("disk", 2), ("late-1", 1), ("late-7", 3)])
def test_one_trajectory_bit_for_bit_behind_caches(
    make_bank: Make,
    train: Run,
    every_record: Records,
    stores: dict[str, Any],
    reference: dict[Any, Any],
    where: str,
    depth: int,
    times: int,
) -> None:
    def run(**options: Any) -> tuple[list[float], list[Tensor], MemoryBank]:
        bank = make_bank(BY_ORDER, optimizer=lambda p: RowAdam(p, lr=0.05), codec="bf16", **options)
        return train(bank, adversarial_batches(), depth), every_record(bank), bank

    if "plain" not in reference:
        reference["plain"] = run()
    expected_losses, expected, plain = reference["plain"]
    losses, records, bank = run(placement=stores[where], cache=times * tiny(plain))
    assert losses == expected_losses
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(records, expected, strict=True))
    assert all(isinstance(bank.source(table).store, WritableCachedStore) for table in bank.tables)
    assert bank.cache_counts().keys() == {(1, 0), (3, 0)} and not plain.cache_counts()
    assert all(counts["hits"] > 0 for counts in bank.cache_counts().values())


@settings(max_examples=10)
@given(
    st.sampled_from([{}, BY_ORDER, {"row_dim": (3, 3, 2), "max_ngram": 4}, {"scheme": "qwen_ple", "row_multiple": 8}]),
    st.sampled_from(["fp32", "bf16", "fp16", "fp8", "int8"]), st.sampled_from([1, 50]), st.integers(0, 99),
)  # fmt: skip
def test_a_memory_is_read_the_same_behind_caches(
    make_bank: Make, config: dict[str, Any], codec: str, times: int, seed: int
) -> None:
    """And as often as it is written anew."""
    torch.manual_seed(seed)
    plain = make_bank(config, codec=codec, dtype=torch.bfloat16)
    bank = make_bank(config, codec=codec, dtype=torch.bfloat16, placement="host", cache=times * tiny(plain, parts=3))
    for _ in range(3):
        shape = (random.randint(1, 3), random.randint(1, 9))
        live = torch.rand(shape) < 0.7 if random.random() < 0.5 else None
        tokens = Tokens(torch.randint(2, 40, shape), torch.rand(shape) < 0.2, live)
        mine, theirs = bank.prefetch(tokens, tokens), plain.prefetch(tokens, tokens)
        for layer in bank.config.layers:
            for micro in range(2):
                assert torch.equal(*(step[micro].wait(layer)["engram"] for step in (mine, theirs)))
        assert mine.touched == theirs.touched
        mine.discard()
        theirs.discard()
        counts = bank.cache_counts()
        assert counts.keys() == {(layer, order) for layer in bank.config.layers for order in bank.config.orders}
        reads = {
            (layer, order): sum(map(line.get, ("hits", "repeats", "misses"))) for (layer, order), line in counts.items()
        }
        assert len(set(reads.values())) == 1  # every order is read as often, whichever tables they are in
        for table in bank.tables:
            row_format = bank.source(table).format
            keys = make_keys(table.space, torch.randperm(table.rows)[:9])
            planes = {"value": torch.randn(len(keys), table.dim), "count": torch.ones(len(keys), 1)}
            for one in (bank, plain):
                store = one.source(table).store
                assert isinstance(store, WritableStore)
                store.write(keys, row_format.encode(keys, planes))


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_one_trajectory_on_a_gpu_at_any_depth(
    make_bank: Make, train: Run, every_record: Records, stores: dict[str, Any], where: str
) -> None:
    runs = []
    for depth, cache in ((0, None), (1, None), (4, None), (1, "100KB"), (4, "100KB"), (4, "10MB")):
        bank = make_bank(BY_ORDER, optimizer=RowAdam, codec="bf16", placement=stores[where], device="cuda", cache=cache)
        runs.append((train(bank, adversarial_batches(), depth), every_record(bank)))
    for losses, records in runs[1:]:
        assert losses == runs[0][0]
        assert all(torch.equal(a, b) for a, b in zip(records, runs[0][1], strict=True))


def dense_copy(bank: MemoryBank, all_records: list[Tensor]) -> list[nn.Embedding]:
    """One dense embedding a table, with the bank's initial rows."""
    copies = []
    for table, records in zip(bank.tables, all_records, strict=True):
        source = bank.source(table)
        keys = make_keys(table.space, torch.arange(table.rows))
        embedding = nn.Embedding(table.rows, table.dim)
        with torch.no_grad():
            embedding.weight.copy_(source.format.decode(keys, records)["value"])
        copies.append(embedding)
    return copies


def dense_forward(bank: MemoryBank, dense: list[nn.Embedding], tokens: Tokens, layer: int) -> Tensor:
    """A layer's embeddings by plain ``nn.Embedding``s over the same row ids."""
    windows = bank.addressing.windows(tokens.ids, doc_start=tokens.doc_start, live=tokens.live)
    rows = bank.addressing.rows(windows, layer)[1]
    parts = [
        embedding(rows[..., table.columns] - table.first_row).flatten(2)
        for table, embedding in zip(bank.tables, dense, strict=True)
        if table.layer == layer
    ]
    whole = torch.cat(parts, dim=-1)
    return whole if tokens.live is None else whole * tokens.live[..., None]


@settings(max_examples=25)
@given(
    st.sampled_from([{}, BY_ORDER, {"row_dim": (3, 3, 2), "max_ngram": 4}, {"scheme": "qwen_ple", "row_multiple": 8}]),
    st.integers(2, 40), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_merged_gradients_equal_a_dense_embeddings(
    make_bank: Make, every_record: Records, config: dict[str, Any], rows: int, micro_batches: int, seed: int
) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    bank = make_bank({**config, "rows_per_head": rows}, optimizer=RowwiseAdam)
    dense = dense_copy(bank, every_record(bank))
    batches = []
    for _ in range(micro_batches):
        shape = (random.randint(1, 3), random.randint(1, 9))
        live = torch.rand(shape) < random.choice([0.0, 0.6, 1.0]) if random.random() < 0.7 else None
        ids = torch.randint(bank.addressing.raw_size, shape) % random.choice([3, 40])
        batches.append(Tokens(ids, torch.rand(shape) < 0.2, live))
    step = bank.prefetch(*batches)
    for micro, tokens in enumerate(batches):
        for layer in bank.config.layers:
            mine, theirs = step[micro].wait(layer)["engram"], dense_forward(bank, dense, tokens, layer)
            assert torch.equal(mine, theirs)
            weight = torch.randn(mine.shape)
            (mine * weight).sum().backward()
            (theirs * weight).sum().backward()
    step.reduce()
    expected = [embedding.weight.grad for embedding in dense]
    for proxy, table, grad, embedding in zip(bank.parameters(), bank.tables, expected, dense, strict=True):
        touched = step._rows[table.layer]
        keys = next(rows.keys for rows in touched if rows.table is table) & (2**40 - 1)
        assert grad is not None and proxy.grad is not None
        assert torch.allclose(proxy.grad, grad[keys], atol=1e-5)
        assert torch.equal(proxy.data, embedding.weight.data[keys])
        grad[keys] = 0
        assert not grad.any()  # nothing that a live position read is missing
    norm = torch.cat([proxy.grad.flatten() for proxy in bank.parameters() if proxy.grad is not None]).norm()
    assert torch.allclose(step.norm(), norm)


def test_dead_positions_never_change_a_row(make_bank: Make, train: Run, every_record: Records) -> None:
    bank = make_bank(optimizer=RowwiseAdam)
    before = every_record(bank)
    train(bank, [[Tokens(torch.randint(60, (2, 5)), live=torch.zeros(2, 5, dtype=torch.bool))] for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(before, every_record(bank), strict=True))
    ids, live = torch.randint(60, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    live[:, 6:] = False
    banks = [make_bank(optimizer=RowwiseAdam), make_bank(optimizer=RowwiseAdam)]
    sums = []
    for bank, tokens in zip(banks, (Tokens(ids, live=live), Tokens(ids[:, :6])), strict=True):
        step = bank.prefetch(tokens)
        sum(step[0].wait(layer)["engram"].sum() for layer in (1, 3)).backward()  # type: ignore[union-attr]
        step.reduce()
        sums.append(step.norm())
        step.apply()
    assert torch.equal(sums[0], sums[1])
    assert all(torch.equal(a, b) for a, b in zip(*map(every_record, banks), strict=True))


@settings(max_examples=12)
@given(st.data())
def test_decoding_equals_the_whole_and_follows_the_cache(make_bank: Make, data: st.DataObject) -> None:
    bank = make_bank({"max_ngram": data.draw(st.integers(2, 5))})
    ids = torch.randint(60, (3, 12))
    start, live = torch.rand(3, 12) < 0.15, torch.rand(3, 12) < 0.85
    history, position = bank.new_history(drafts=3), 0
    while position < 12:
        width = min(data.draw(st.integers(1, 4)), 12 - position)
        part = slice(position, position + width)
        memory = bank.read(Tokens(ids[:, part], start[:, part], live[:, part], history))
        for layer in (1, 3):
            whole = bank.read(Tokens(ids, start, live)).wait(layer)["engram"]
            assert torch.equal(memory.wait(layer)["engram"], whole[:, part])
        drop = data.draw(st.integers(0, min(3, width - 1)))  # drafts that were rejected
        history.crop(drop)
        position += width - drop
        order = torch.tensor(data.draw(st.permutations(range(3))))
        history.select(order)
        ids, start, live = ids[order], start[order], live[order]
