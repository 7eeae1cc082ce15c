"""A working set from prefetch to write-back: what each call does, what it refuses, and that nothing is left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.memory import MemoryBank, Tokens, WorkingSet, join
from torch_engram.optim import ROW_OPTIMIZERS, RowAdam, RowwiseAdam

Make = Callable[..., MemoryBank]
Records = Callable[[MemoryBank], list[Tensor]]


def ids(*shape: int) -> Tensor:
    return torch.randint(60, shape or (2, 7))


def backward(step: WorkingSet, name: str = "engram", factor: float = 1.0, micros: int | None = None) -> None:
    for micro in range(len(step) if micros is None else micros):
        for layer in (1, 3):
            (step[micro].wait(layer)[name].square().sum() * factor).backward()


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_shapes_and_layers(make_bank: Make) -> None:
    bank = make_bank(optimizer=RowwiseAdam, dtype=torch.bfloat16)
    step = bank.prefetch(ids(2, 7), ids(3, 1))
    assert len(step) == 2
    assert step[0].wait(0) == step[0].wait(2) == {}
    leaf = step[1].wait(3)["engram"]
    assert leaf.shape == (3, 1, bank.config.embedding_dim) and leaf.dtype == torch.bfloat16
    assert leaf.is_leaf and leaf.requires_grad and step[1].wait(3)["engram"] is leaf
    for micro in (2, -1):
        with pytest.raises(IndexError, match="has 2 micro-batches"):
            step[micro]
    assert not bank.read(ids()).wait(1)["engram"].requires_grad
    with pytest.raises(ValueError, match="pass one micro-batch or more"):
        bank.prefetch()


def test_embeddings_go_with_their_gradient_and_come_again(make_bank: Make) -> None:
    """So that a step of many micro-batches holds no more of them than one of two."""
    step = make_bank(optimizer=RowAdam).prefetch(*(ids(2, 7) for _ in range(4)))
    held, before = [], []
    for micro in range(4):
        leaf = step[micro].wait(1)["engram"]
        held.append(weakref.ref(leaf))
        before.append(leaf.detach().clone())
        leaf.square().sum().backward()
        del leaf
    gc.collect()
    assert [each() for each in held] == [None] * 4
    merged = step._rows[1][0].total_grad().clone()
    for micro in reversed(range(4)):
        out = torch.empty_like(before[micro])
        assert torch.equal(step.expand(1, micro, out), before[micro])
        assert torch.equal(step.expand(1, micro, out), before[micro])
        again = step[micro].wait(1)["engram"]
        assert torch.equal(again, before[micro])
        again.square().sum().backward()
    torch.testing.assert_close(step._rows[1][0].total_grad(), 2 * merged)


def test_untouched_rows_keep_their_bytes_and_touched_ones_count(make_bank: Make, every_record: Records) -> None:
    bank = make_bank(optimizer=RowAdam)
    before = every_record(bank)
    step = bank.prefetch(ids(1, 3))
    backward(step)
    step.reduce()
    touched = {rows.table.space: rows.keys & (2**40 - 1) for layer in (1, 3) for rows in step._rows[layer]}
    assert step.touched == sum(map(len, touched.values()))
    step.apply()
    for table, old, new in zip(bank.tables, before, every_record(bank), strict=True):
        changed = (old != new).any(dim=1).nonzero().flatten()
        assert torch.equal(changed, touched[table.space])


def test_a_row_that_was_read_but_got_no_gradient_moves_as_the_oracle_says(make_bank: Make) -> None:
    bank = make_bank(optimizer=lambda p: RowAdam(p, lr=0.1, betas=(0.5, 0.9)))
    tokens = torch.tensor([[5, 6, 7]])
    first = bank.prefetch(tokens)
    backward(first)
    first.reduce()
    first.apply()
    idle = bank.prefetch(tokens)  # no forward, no backward
    idle.reduce()
    (rows,) = idle._rows[1]
    assert rows.planes is not None
    planes = {name: plane.clone() for name, plane in rows.planes.items()}
    assert idle.norm() == 0
    idle.apply()
    (now,) = bank.prefetch(tokens)._ready(1)
    assert now.planes is not None
    assert bool((now.planes["count"] == 2).all())
    assert torch.allclose(now.planes["mean"], planes["mean"] / 2) and torch.allclose(
        now.planes["moment"], planes["moment"] * 0.9
    )
    moved = 0.1 * (planes["mean"] / 2 / 0.75) / ((planes["moment"] * 0.9 / 0.19).sqrt() + 1e-8)
    assert torch.allclose(now.planes["value"], planes["value"] - moved, atol=1e-6)


def test_clipping_norm_and_scale_see_the_same_gradients(make_bank: Make, every_record: Records) -> None:
    tokens, results = ids(), []
    for way in ("clip", "scale", "smaller loss"):
        bank = make_bank(optimizer=lambda p: RowwiseAdam(p, lr=0.1, eps=1.0))
        step = bank.prefetch(tokens)
        backward(step, factor=0.25 if way == "smaller loss" else 1.0)
        step.reduce()
        norm = step.norm()
        if way == "clip":
            assert torch.allclose(torch.nn.utils.clip_grad_norm_(bank.parameters(), float(norm) / 4), norm)
            assert torch.allclose(step.norm(), norm / 4)
        step.apply(0.25 if way == "scale" else 1.0)
        results.append(torch.cat([records.flatten() for records in every_record(bank)]).view(torch.float32))
    for other in results[1:]:
        assert torch.allclose(other, results[0], atol=1e-5, equal_nan=True)


def test_a_scheduler_rules_the_learning_rate(make_bank: Make, every_record: Records) -> None:
    bank = make_bank(optimizer=lambda p: RowwiseAdam(p, lr=1.0))
    assert bank.optimizer is not None
    scheduler = torch.optim.lr_scheduler.LambdaLR(bank.optimizer, lambda epoch: float(epoch == 0))
    for learns in (True, False):
        before = bank.read(torch.tensor([[5, 6]])).wait(1)["engram"]
        step = bank.prefetch(torch.tensor([[5, 6]]))
        backward(step)
        step.reduce()
        step.apply()
        scheduler.step()
        assert torch.equal(before, bank.read(torch.tensor([[5, 6]])).wait(1)["engram"]) != learns


def test_a_discarded_step_changes_no_byte(make_bank: Make, every_record: Records) -> None:
    bank = make_bank(optimizer=RowAdam)
    before = every_record(bank)
    for reach in ("prefetch", "backward", "reduce"):
        step = bank.prefetch(ids())
        if reach != "prefetch":
            backward(step)
        if reach == "reduce":
            step.reduce()
        step.discard()
        step.discard()
        assert all(proxy.numel() == 0 and proxy.grad is None for proxy in bank.parameters())
        with pytest.raises(ValueError, match="applied or discarded: prefetch the next step's tokens"):
            step.apply()
        with pytest.raises(ValueError, match="applied or discarded: prefetch the tokens again"):
            step[0].wait(1)
    assert same(before, every_record(bank))


def test_calls_out_of_order_are_told(make_bank: Make) -> None:
    step = make_bank(optimizer=RowAdam).prefetch(ids())
    with pytest.raises(ValueError, match=r"call reduce\(\) before apply\(\)"):
        step.apply()
    with pytest.raises(ValueError, match=r"call reduce\(\) before norm\(\)"):
        step.norm()
    step.reduce()
    with pytest.raises(ValueError, match=r"reduce\(\) was called already"):
        step.reduce()
    frozen = make_bank().prefetch(ids())
    with pytest.raises(ValueError, match=r"only read: use prefetch.* on a bank that has an optimizer"):
        frozen.reduce()


def test_a_step_whose_rows_were_read_too_early_is_refused(make_bank: Make, every_record: Records) -> None:
    bank = make_bank(optimizer=RowAdam)
    stale, first = bank.prefetch(ids()), bank.prefetch(ids())
    stale[0].wait(1)
    backward(first)
    first.reduce()
    first.apply()
    after = every_record(bank)
    stale.reduce()
    with pytest.raises(ValueError, match="apply each step before the next one is read"):
        stale.apply()
    assert same(after, every_record(bank))


def test_two_reduced_steps_do_not_take_each_others_place(make_bank: Make, every_record: Records) -> None:
    tokens = ids()
    alone, bank = make_bank(optimizer=RowAdam), make_bank(optimizer=RowAdam)
    only, step, other = alone.prefetch(tokens), bank.prefetch(tokens), bank.prefetch(tokens)
    for each in (only, step, other):
        backward(each)
        each.reduce()
    with pytest.raises(ValueError, match=r"before the next reduce\(\)"):
        step.apply()
    step.discard()  # leaves the other one bound
    other.apply()
    only.apply()
    assert same(every_record(alone), every_record(bank))


def test_two_forwards_before_their_backwards(make_bank: Make, every_record: Records) -> None:
    tokens = [ids(), ids()]
    banks = [make_bank(optimizer=RowwiseAdam), make_bank(optimizer=RowwiseAdam)]
    for interleaved, bank in enumerate(banks):
        step = bank.prefetch(*tokens)
        losses = []
        for micro in range(2):
            losses.append(step[micro].wait(1)["engram"].square().sum() + step[micro].wait(3)["engram"].sum())
            if not interleaved:
                losses[-1].backward()
        if interleaved:
            for loss in losses:
                loss.backward()
        step.reduce()
        step.apply()
    assert same(*map(every_record, banks))


def test_gradients_of_several_backwards_add_up(make_bank: Make) -> None:
    norms = []
    for times in (1, 3):
        step = make_bank(optimizer=RowwiseAdam).prefetch(torch.tensor([[5, 6]]))
        for _ in range(times):
            step[0].wait(1)["engram"].sum().backward()
        step.reduce()
        norms.append(step.norm())
    assert torch.equal(norms[1], 3 * norms[0])


def test_several_memories_at_once(make_bank: Make, every_record: Records) -> None:
    tokens = ids()
    names = ("a", "b")
    together = [make_bank(optimizer=RowwiseAdam, name=name, seed=i) for i, name in enumerate(names)]
    apart = [make_bank(optimizer=RowwiseAdam, name=name, seed=i) for i, name in enumerate(names)]
    steps = [bank.prefetch(tokens) for bank in together]
    memory = join(*(step[0] for step in steps))
    assert set(memory.wait(1)) == {"a", "b"} and memory.wait(0) == {}
    sum(e.square().sum() for layer in (1, 3) for e in memory.wait(layer).values()).backward()  # type: ignore[union-attr]
    for step in steps:
        step.reduce()
        step.apply()
    for bank, other, name in zip(apart, together, names, strict=True):
        step = bank.prefetch(tokens)
        backward(step, name)
        step.reduce()
        step.apply()
        assert same(every_record(bank), every_record(other))
    with pytest.raises(ValueError, match="Two memories are named 'a' at layer 1: give each bank its own name"):
        join(together[0].read(tokens), together[0].read(tokens)).wait(1)


@pytest.mark.parametrize("token", [-1, 60])
def test_a_strange_id_raises_where_its_memory_is_waited_for(make_bank: Make, every_record: Records, token: int) -> None:
    bank = make_bank(optimizer=RowAdam)
    before = every_record(bank)
    step = bank.prefetch(ids(), torch.tensor([[1, token]]))
    for use in (lambda: step[0].wait(1), lambda: step[0].wait(3), step.reduce):
        with pytest.raises(ValueError, match=f"^Token id {token} is outside [^\n]*: use [^\n]*$"):
            use()
    step.discard()
    assert step[0] is not None and same(before, every_record(bank))
    good = bank.prefetch(ids())  # the bank goes on
    backward(good)
    good.reduce()
    good.apply()


def test_a_layer_does_not_wait_for_a_later_layers_rows(make_bank: Make) -> None:
    bank, gate = make_bank(optimizer=RowAdam), threading.Event()
    table = bank.tables[1]
    assert table.layer == 3
    source = bank.source(table)
    inner = source.store.fetch

    def fetch(keys: Tensor, group: Tensor | None = None) -> Tensor:
        if len(keys) and int(keys[0]) >> 40 == table.space:
            gate.wait(30)
        return inner(keys, group)

    source.store.fetch = fetch  # type: ignore[method-assign]
    step = bank.prefetch(ids())
    assert step[0].wait(1)["engram"].shape[0] == 2
    assert not step._fetches[3].done()
    gate.set()
    step[0].wait(3)


def test_nothing_accumulates_over_steps(make_bank: Make, stores: dict[str, Any]) -> None:
    for placement in ("device", "host", "late-7"):
        bank = make_bank(optimizer=RowAdam, placement=stores[placement])
        leaves, logs = [], []
        ahead = [bank.prefetch(ids()) for _ in range(3)]
        for number in range(100):
            ahead.append(bank.prefetch(ids()))
            step = ahead.pop(0)
            backward(step)
            leaves += [weakref.ref(step[0].wait(layer)["engram"]) for layer in (1, 3)]
            step.reduce()
            step.apply()
            logs.append(max(len(source._writes) for source in bank._sources))
            if number % 20 == 0:
                bank.flush()  # a store's own thread may be behind by any number of steps
        del step
        assert [leaf for leaf in leaves if leaf() is not None] == []
        bank.flush()
        assert max(logs) <= 2 * (20 + 4)  # two tables: what no flush and no reader has seen, not all 100 steps
        while ahead:
            ahead.pop().discard()
        assert not any(source.in_use for source in bank._sources)


def test_a_forgotten_step_lets_go_of_everything(make_bank: Make) -> None:
    bank = make_bank(optimizer=RowAdam)
    step = bank.prefetch(ids())
    leaf = weakref.ref(step[0].wait(1)["engram"])
    del step
    gc.collect()
    assert leaf() is None
    assert not any(source.in_use for source in bank._sources)


def test_a_step_may_be_forgotten_anywhere(make_bank: Make) -> None:
    """A garbage collector may find it while its own thread holds the lock that letting go of rows takes."""
    bank = make_bank(optimizer=RowAdam)
    step = bank.prefetch(ids())
    step[0].wait(1)
    assert any(source.in_use for source in bank._sources)
    with bank._sources[0]._counting:
        del step
        gc.collect()
    assert not any(source.in_use for source in bank._sources)


def test_the_leafs_gradient_is_merged_and_let_go(make_bank: Make) -> None:
    step = make_bank(optimizer=RowAdam).prefetch(ids())
    leaf = step[0].wait(1)["engram"]
    leaf.sum().backward()
    assert leaf.grad is None
    assert step._rows[1][0].grad is not None


def test_empty_sequences_and_batches(make_bank: Make) -> None:
    bank = make_bank(optimizer=RowAdam)
    step = bank.prefetch(ids(2, 0), Tokens(ids(0, 4)))
    assert step[0].wait(1)["engram"].shape == (2, 0, 16)
    backward(step)
    step.reduce()
    assert step.norm() == 0
    step.apply()


def test_rows_that_somebody_else_has_hashed(make_bank: Make, stores: dict[str, Any]) -> None:
    bank = make_bank(placement=stores["read-only"])
    tokens = ids(2, 9)
    mixes, rows = bank.addressing.rows(bank.addressing.windows(tokens), 3)
    expected = bank.read(tokens).wait(3)["engram"]
    memory = bank.read_rows(3, rows, mixes)
    assert torch.equal(memory.wait(3)["engram"], expected) and memory.wait(1) == {}
    store: Any = bank.source(bank.tables[1]).store
    (keys, group), (read_keys, read_group) = store.asked[-1], store.asked[-2]
    assert torch.equal(keys, read_keys) and torch.equal(group, read_group)


def test_rows_are_read_from_many_threads_at_once(make_bank: Make) -> None:
    bank = make_bank(optimizer=RowAdam)
    batches = [ids(2, 5) for _ in range(40)]
    expected = [bank.read(batch).wait(1)["engram"] for batch in batches]
    found: dict[int, Tensor] = {}

    def read(number: int) -> None:
        rows = bank.addressing.rows(bank.addressing.windows(batches[number]), 1)[1]
        found[number] = bank.read_rows(1, rows).wait(1)["engram"]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], rows) for number, rows in enumerate(expected))
    assert not bank.source(bank.tables[0]).in_use


@given(case=st.integers(0, 10**6), kind=st.sampled_from(["adam", "rowwise_adam"]))
@settings(max_examples=8)
@pytest.mark.parametrize("where", ["host", "late-7"])
def test_rows_that_others_read_take_the_step_as_if_read_here(
    make_bank: Make, stores: dict[str, Any], every_record: Records, where: str, case: int, kind: str
) -> None:
    """With writes that no fetch has seen yet, and whatever the two have in common."""
    draw = torch.Generator().manual_seed(case)
    steps = [
        [torch.randint(2 + case % 60, (1, int(torch.randint(0, 9, (), generator=draw))), generator=draw) for _ in "ab"]
        for _ in range(4)
    ]
    found = []
    for told in (True, False):
        bank = make_bank(optimizer=ROW_OPTIMIZERS[kind], placement=stores[where])
        for mine, others in steps:
            step = bank.prefetch(mine) if told else bank.prefetch(mine, others)
            backward(step, micros=1)
            if told:
                theirs = bank.prefetch(others)
                for rows, read in zip(step._all_rows(), theirs._all_rows(), strict=True):
                    rows.take_in(torch.cat((read.keys, rows.keys)).unique())
                theirs.discard()
            step.reduce()
            step.apply()
        found.append(every_record(bank))
    assert same(*found)
