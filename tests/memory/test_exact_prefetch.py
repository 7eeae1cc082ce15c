"""What is made ahead of a step is exact when the step reads it, and only what was written since is made again."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_engram.memory import FixedMemory, MemoryBank, Tokens, WorkingSet
from torch_engram.memory.rows import TouchedRows
from torch_engram.memory.source import Source
from torch_engram.optim import ROW_OPTIMIZERS, RowAdam
from torch_engram.stores import decoded

Make = Callable[..., MemoryBank]
Records = Callable[[MemoryBank], list[Tensor]]
BY_ORDER = dict(row_dim=(3, 5), heads=(2, 3))
STEPS = 30


def batches(steps: int = STEPS) -> list[list[Tokens]]:
    """Few distinct tokens, so that most rows come back at once and some after several steps; dead positions."""
    generator, found = torch.Generator().manual_seed(3), []
    for number in range(steps):
        shape = 2, 3 + number % 4
        ids = [torch.randint(2, 4 + number % 9, shape, generator=generator) for _ in range(1 + number % 2)]
        live = torch.rand(shape, generator=generator) < 0.7 if number % 3 else None
        found.append([Tokens(part, live=live) for part in ids])
    return found


def trajectory(bank: MemoryBank, data: list[list[Tokens]], depth: int, reads: bool = False) -> list[Tensor]:
    """The embeddings of every step, and those of reads between steps, of a training ``depth`` steps ahead."""
    seen: list[Tensor] = []
    ahead: deque[WorkingSet] = deque()
    for number in range(len(data)):
        while len(ahead) <= depth and number + len(ahead) < len(data):
            ahead.append(bank.prefetch(*data[number + len(ahead)]))
        step = ahead.popleft()
        for micro in range(len(step)):
            for layer in (1, 3):
                embeddings = step[micro].wait(layer)["engram"]
                seen.append(embeddings.detach().clone())
                (embeddings - 0.3).square().sum().backward()
        step.reduce()
        step.apply()
        if reads:
            seen += [bank.read(data[number - 1][0]).wait(layer)["engram"].clone() for layer in (3, 1)]
    return seen


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Inline:
    """Runs what is submitted at once: the interpreter of kernels takes one thread only."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def make_kernel_bank(make_bank: Make, in_place: None, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Banks whose rows stay in their records and go through the kernels, on a CPU, too."""

    def make(config: dict[str, Any] | None = None, **options: Any) -> MemoryBank:
        bank = make_bank(config, **options)
        if bank.device.type == "cpu":
            monkeypatch.setattr(bank._prefetcher, "_worker", Inline())
        return bank

    return make


@pytest.fixture(scope="module")
def unhurried(make_bank: Make, every_record: Records) -> Callable[[str, torch.dtype, bool], list[Tensor]]:
    """The trajectory of rows on the device that nothing makes ahead, and with ``reads`` of reads between its steps."""

    @functools.cache
    def run(codec: str, dtype: torch.dtype, reads: bool) -> list[Tensor]:
        bank = make_bank(BY_ORDER, optimizer=lambda p: RowAdam(p, lr=0.05), codec=codec, dtype=dtype)
        return trajectory(bank, batches(), 0, reads) + every_record(bank)

    return run


@pytest.mark.parametrize("where", ["device", "host", "disk", "late-7"])
@pytest.mark.parametrize("codec, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_embeddings_are_exact_at_any_depth(
    make_bank: Make, every_record: Records, stores: dict[str, Any], unhurried: Any, where: str, codec: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    for depth in 1, 3:
        bank = make_bank(
            BY_ORDER, optimizer=lambda p: RowAdam(p, lr=0.05), codec=codec, dtype=dtype, placement=stores[where]
        )
        assert same(trajectory(bank, batches(), depth) + every_record(bank), unhurried(codec, dtype, False))


@pytest.mark.parametrize(
    "optimizer, codec", [("adam", "bf16"), ("rowwise_adam", "fp32"), ("adagrad", "bf16"), ("sinkhorn", "fp32")]
)
def test_the_kernels_are_exact_at_any_depth_and_near_their_twins(
    make_kernel_bank: Make, make_bank: Make, every_record: Records, device: torch.device, optimizer: str, codec: str
) -> None:
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("compiled kernels take tensors of the GPU alone")
    data, runs = batches(5 if device.type == "cpu" else STEPS), []
    settings = dict(weight_decay=0.5, lazy_decay=True) if optimizer in ("adagrad", "sinkhorn") else {}
    options: dict[str, Any] = dict(optimizer=lambda p: ROW_OPTIMIZERS[optimizer](p, lr=0.05, **settings), codec=codec)
    for depth in (0, 3) if device.type == "cpu" else (0, 1, 3):  # the interpreter takes its time
        bank = make_kernel_bank(BY_ORDER, device=device, **options)
        runs.append(trajectory(bank, data, depth, reads=True) + every_record(bank))
    assert all(same(run, runs[0]) for run in runs[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded, "use_kernels", lambda records: False)
        twin = trajectory(make_bank(BY_ORDER, device=device, **options), data, 0, reads=True)
    for mine, theirs in zip(runs[0][:8], twin[:8], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-7 if codec == "bf16" else 1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_is_exact_at_any_depth_while_it_runs_behind(
    make_bank: Make, every_record: Records, where: str, dtype: torch.dtype
) -> None:
    """Large steps, nothing read back by the host: patches, merges and memory used again have to wait by themselves."""
    generator = torch.Generator().manual_seed(1)
    data = [[Tokens(torch.randint(60, (16, 400), generator=generator).cuda())] for _ in range(40)]
    runs = []
    for depth in (0, 1, 2, 3):
        bank = make_bank(
            dict(row_dim=64, rows_per_head=3001), optimizer=lambda p: RowAdam(p, lr=0.05), codec="bf16",
            dtype=dtype, device="cuda", placement=where,
        )  # fmt: skip
        runs.append(trajectory(bank, data, depth, reads=True) + every_record(bank))
    assert all(same(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_reads_between_steps_see_every_write(
    make_bank: Make, every_record: Records, stores: dict[str, Any], unhurried: Any, where: str
) -> None:
    bank = make_bank(BY_ORDER, optimizer=lambda p: RowAdam(p, lr=0.05), placement=stores[where])
    expected = unhurried("fp32", torch.float32, True)
    assert same(trajectory(bank, batches(), 2, reads=True) + every_record(bank), expected)


def test_the_first_is_expanded_before_anybody_waits(make_bank: Make, device: torch.device) -> None:
    bank = make_bank(BY_ORDER, optimizer=RowAdam, device=device)
    step = bank.prefetch(*(Tokens(torch.randint(60, (2, 5), device=device)) for _ in range(2)))
    for layer in (1, 3):
        prepared = step._fetches[layer].result(30)
        assert prepared._done is None or prepared._done.synchronize() is None
        ((embeddings, _),) = prepared._expanded.values()
        made = embeddings.clone()
        waited = step[0].wait(layer)["engram"]
        assert torch.equal(made, waited.detach())
        assert waited.data_ptr() == embeddings.data_ptr()


def test_only_what_was_written_is_made_again(make_bank: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(dict(rows_per_head=997), optimizer=lambda p: RowAdam(p, lr=0.05))
    written, apart = torch.full((1, 4), 5), torch.full((1, 4), 9)
    first, same_rows, others = (bank.prefetch(tokens) for tokens in (written, written, apart))
    ready = [[step._fetches[layer].result(30) for layer in (1, 3)] for step in (same_rows, others)]
    ahead = [layers[0]._expanded[0][0] for layers in ready]
    before = [embeddings.clone() for embeddings in ahead]
    (first[0].wait(1)["engram"].sum() + first[0].wait(3)["engram"].sum()).backward()
    first.reduce()
    assert not torch.isin(first._rows[1][0].keys, others._rows[1][0].keys).any()
    first.apply()
    assert same(ahead, before)
    expanded: list[int] = []
    expand = TouchedRows.expand

    def noted(self: TouchedRows, micro: int, out: Tensor) -> None:
        if self.source in bank._sources:  # other tests' banks may still be at work
            expanded.append(self.table.layer)
        expand(self, micro, out)

    monkeypatch.setattr(TouchedRows, "expand", noted)
    assert torch.equal(others[0].wait(1)["engram"], before[1]) and expanded == []
    assert not torch.equal(same_rows[0].wait(1)["engram"], before[0]) and expanded == [1]
    assert torch.equal(same_rows[0].wait(1)["engram"], bank.read(written).wait(1)["engram"])


def test_the_prefetch_thread_expands(make_bank: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(optimizer=RowAdam)
    threads: list[str] = []
    expand = TouchedRows.expand

    def noted(self: TouchedRows, micro: int, out: Tensor) -> None:
        if self.source in bank._sources:
            threads.append(threading.current_thread().name)
        expand(self, micro, out)

    monkeypatch.setattr(TouchedRows, "expand", noted)
    step = bank.prefetch(torch.randint(60, (2, 7)))
    for layer in (1, 3):
        step._fetches[layer].result(30)
        step[0].wait(layer)
    assert threads == ["engram-prefetch_0"] * 2


def test_a_patch_that_failed_is_tried_again(make_bank: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, tokens = make_bank(optimizer=lambda p: RowAdam(p, lr=0.05)), torch.full((1, 4), 5)
    first, second = bank.prefetch(tokens), bank.prefetch(tokens)
    (first[0].wait(1)["engram"].sum() + first[0].wait(3)["engram"].sum()).backward()
    first.reduce()
    first.apply()

    def fails(*arguments: Any) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(Source, "lay_over", fails)
        second[0].wait(1)
    assert torch.equal(second[0].wait(1)["engram"], bank.read(tokens).wait(1)["engram"])


def test_a_closed_step_holds_no_embeddings(make_bank: Make) -> None:
    bank = make_bank(optimizer=RowAdam)
    step = bank.prefetch(torch.randint(60, (2, 7)))
    step[0].wait(1)
    prepared = [step._fetches[layer].result(30) for layer in (1, 3)]
    step.discard()
    assert all(not layer._expanded for layer in prepared)
    assert step.touched > 0


@pytest.mark.parametrize("depth", [0, 2])
def test_a_fixed_memory_is_loaded_with_what_is_exact(make_bank: Make, depth: int) -> None:
    data = [torch.randint(2, 5 + number % 3, (2, 6)) for number in range(12)]
    bank, plain = (make_bank(BY_ORDER, optimizer=lambda p: RowAdam(p, lr=0.05)) for _ in range(2))
    fixed, ahead = FixedMemory(bank, 2, 6), deque[WorkingSet]()
    for number, tokens in enumerate(data):
        while len(ahead) <= depth and number + len(ahead) < len(data):
            ahead.append(bank.prefetch(data[number + len(ahead)]))
        step, expected = ahead.popleft(), plain.prefetch(tokens)
        fixed.load(step)
        for layer in (1, 3):
            found, wanted = fixed.wait(layer)["engram"], expected[0].wait(layer)["engram"]
            assert torch.equal(found, wanted)
            for leaf in (found, wanted):
                leaf.square().sum().backward()
        fixed.merge()
        for each in (step, expected):
            each.reduce()
            each.apply()


def test_a_fetch_ahead_sees_writes_that_are_under_way_and_one_that_is_wanted_now_does_not_wait(
    make_bank: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = make_bank(optimizer=RowAdam, placement="host")
    may_write, laid_over = threading.Event(), list[int]()
    table = bank.source(bank.tables[0]).store.table  # type: ignore[attr-defined]
    scatter, lay_over = table.scatter, Source.lay_over

    def scatter_late(*arguments: Tensor) -> None:
        may_write.wait()
        scatter(*arguments)

    def spy(self: Source, rows: Any, epoch: int, space: int) -> Tensor:
        laid_over.append(epoch)
        return lay_over(self, rows, epoch, space)

    monkeypatch.setattr(table, "scatter", scatter_late)
    monkeypatch.setattr(Source, "lay_over", spy)

    def train(step: WorkingSet) -> None:
        for layer in (1, 3):
            step[0].wait(layer)["engram"].sum().backward()
        step.reduce()
        step.apply()

    train(bank.prefetch(torch.tensor([[3, 4, 5]])))
    newest = bank.source(bank.tables[0]).newest
    now = bank.prefetch(torch.tensor([[3, 4, 5]]))  # the writes are under way, and nobody may wait for them
    assert now._fetches[3].result(timeout=60)
    later = bank.prefetch(torch.tensor([[3, 4, 5]]))
    may_write.set()
    assert later._fetches[3].result(timeout=60)
    train(now)
    assert set(laid_over) == {0}
    laid_over.clear()
    train(later)
    assert laid_over and min(laid_over) >= newest
