"""The ways from host memory to a GPU: the same rows by all of them, alone and together, and none that is not there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.stores import (
    HostStore,
    Plane,
    RecordLayout,
    Store,
    host_asks,
    host_memory,
    host_reads,
    make_keys,
    staging,
)
from torch_engram.stores.asks import PlainAsk, new_ask
from torch_engram.stores.host_asks import SHARES, HostAsk
from torch_engram.stores.host_memory import PrivateMemory, UnifiedMemory, own_memory
from torch_engram.stores.host_reads import ALL, HostReads, divide
from torch_engram.stores.pages import private_memory
from torch_engram.stores.slots import EMPTY, WAYS, Region, Slots, pick
from torch_engram.stores.slots import Reads as SlotReads
from torch_engram.stores.staging import Staging
from torch_engram.stores.table import RecordTable

CPU = torch.device("cpu")
KERNELS = torch.device("cuda" if torch.cuda.is_available() else "cpu")
reuse = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


def random_table(rows: int = 50, width: int = 6, reached: bool = False) -> RecordTable:
    """``reached``: in memory that can be pinned, and not unified, whatever the machine."""
    layout, spaces = RecordLayout((Plane("value", width, "fp32"),)), {0: rows, 3: 7}
    memory = PrivateMemory(private_memory((rows + 7) * layout.nbytes)) if reached else None
    table = RecordTable(layout, spaces, CPU, memory)
    table.records.random_(256)
    return table


@pytest.fixture(params=["naive", "kernel"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(host_asks, "use_kernels", lambda tensor: request.param == "kernel")
    return str(request.param)


@pytest.mark.parametrize("most", [1, 24 * 3 * 7, 1 << 20])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_staging_moves_pieces_in_order(monkeypatch: pytest.MonkeyPatch, most: int, device: str) -> None:
    monkeypatch.setattr(staging, "STAGING", most)
    table = random_table()
    stage = Staging(torch.device(device), table.layout.nbytes)
    for wanted in (0, 1, 7, 8, 300):
        index = torch.randint(57, (wanted,))
        out = torch.zeros(wanted, 24, dtype=torch.uint8, device=device)
        stage.move(table.records, index, out)
        assert torch.equal(out.cpu(), table.records[index])


@reuse
@given(*[st.floats(0, 1e-3) for _ in range(2)], *[st.floats(1e-9, 1e-7) for _ in range(2)], st.integers(0, 10**6))
def test_both_ways_take_equally_long(gpu: float, cpu: float, gpu_row: float, cpu_row: float, count: int) -> None:
    sizes = (1 << 11, 1 << 16)
    first, share = divide(sizes, [gpu + size * gpu_row for size in sizes], [cpu + size * cpu_row for size in sizes])
    by_gpu = min(count, first + count * share // SHARES)
    takes = (gpu + by_gpu * gpu_row, cpu + (count - by_gpu) * cpu_row)
    slack = (2 + count / SHARES) * (gpu_row + cpu_row)
    if first > 0 and by_gpu < count:
        assert abs(takes[0] - takes[1]) <= slack + 1e-9
    elif first >= count > 0:  # the CPU is not ready before
        assert takes[0] <= cpu + slack + 1e-9


class Runtime:
    """CUDA's part that pins memory, which refuses or does nothing."""

    def __init__(self, refusal: int):
        self.refusal, self.pinned = refusal, list[int]()

    def cudaHostRegister(self, at: int, size: int, flags: int) -> int:
        self.pinned += [] if self.refusal else [at]
        return self.refusal

    def cudaHostUnregister(self, at: int) -> int:
        self.pinned.remove(at)
        return 0


@pytest.fixture
def runtime_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Runtime]:
    def make(refusal: int) -> Runtime:
        runtime = Runtime(refusal)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(synchronize=lambda: None))
        monkeypatch.setattr(host_reads, "_gpu_seconds", lambda ask, keys: 1.0)
        return runtime

    return make


def memory_of(table: RecordTable) -> Any:
    return table.records.numpy().reshape(-1)


def reads_of(table: RecordTable, first: int, share: int) -> HostReads:
    """Reads by both ways, on a GPU where there is one."""
    if KERNELS.type == "cuda":
        table = RecordTable(table.layout, table.spaces, CPU, own_memory(table.records.nbytes))
        table.records.random_(256)
    reads = HostReads(table, KERNELS)
    reads.words, reads.records, reads._division = table.words, table.records, (first, share)
    return reads


def test_a_table_that_cannot_be_pinned_is_gathered_by_the_cpu_with_a_warning(runtime_of: Any) -> None:
    runtime_of(2)
    table, keys = random_table(reached=True), torch.tensor([3, 1, 49])
    with pytest.warns(UserWarning, match=r"cannot be pinned \(CUDA error 2 for 0\.0 GB\): the CPU gathers") as caught:
        reads = HostReads(table, CPU)
    assert len(caught) == 1 and reads.words is None and reads.new_ask(1).by_gpu(1) == 0
    for _ in range(2):
        assert torch.equal(reads.fetch(keys), table.records[keys])


def test_a_table_is_pinned_once_and_as_long_as_it_is_there(runtime_of: Any) -> None:
    runtime, tables = runtime_of(0), [random_table(reached=True)]
    reads = [HostReads(tables[0], CPU) for _ in range(2)]
    assert runtime.pinned == [memory_of(tables[0]).ctypes.data] and reads[0].words is not None
    reads.clear()
    tables.clear()
    assert not runtime.pinned


def test_without_unified_memory_a_table_is_pinned_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> None:
        raise RuntimeError("the CPU may not use it while a GPU does")

    monkeypatch.setattr(host_memory, "UnifiedMemory", refuse)
    with pytest.warns(
        UserWarning, match=r"no unified memory .*the CPU may not use it while a GPU does.* slower"
    ) as caught:
        memory = own_memory(5000)
    assert len(caught) == 1 and isinstance(memory, PrivateMemory) and not memory.bytes.any()
    with pytest.raises(MemoryError, match="are wanted"):
        own_memory(1 << 60)


@pytest.mark.gpu
def test_unified_memory_is_one_for_the_cpu_and_a_gpu() -> None:
    from torch_engram.stores.ask_kernels import read_triton

    memory = UnifiedMemory(5 << 20)
    words = torch.from_numpy(memory.bytes).view(torch.int64)
    assert not words.any()
    words.copy_(torch.arange(len(words)))
    there = torch.from_numpy(memory.reach(torch.device("cuda"))).view(torch.int64)
    keys = torch.randint(len(words), (999,), device="cuda")
    for added in range(3):  # written anew by the CPU each time, and read by the GPU where it is
        words += added
        out, count = torch.zeros(999, 8, dtype=torch.uint8, device="cuda"), torch.full((2,), 999, device="cuda")
        zeros = torch.zeros(1, dtype=torch.int64, device="cuda")
        head = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        read_triton(there[:, None], keys, count, zeros, zeros + len(words), head, 999, 0, out)
        assert torch.equal(out.view(torch.int64)[:, 0].cpu(), words[keys.cpu()])
    kept = memory.bytes[8:16]
    del memory, words, there
    assert kept.view("int64")[0] == 1 + 1 + 2


@reuse
@given(st.integers(0, 40), st.sampled_from([0, 1, 20, 2**62]), st.sampled_from([0, 96, SHARES]), st.integers(0, 9))
def test_a_batch_divided_in_any_way_has_its_rows(form: str, count: int, first: int, share: int, slack: int) -> None:
    reads = reads_of(random_table(), first, share)
    ask = HostAsk(reads, count + slack, (first, share))
    for seed in range(2):  # an ask serves one batch after the other
        generator = torch.Generator().manual_seed(seed)
        keys = torch.cat((torch.randint(50, (count,), generator=generator), torch.full((slack,), -1)))
        keys[: count // 2] = make_keys(3, keys[: count // 2] % 7)
        on_device = keys.to(KERNELS)
        ask.send(on_device, torch.tensor([count, 0], device=KERNELS))
        ask.sent()
        with ask.beside():
            ask.read()
        found = ask.bring()[:count]
        assert torch.equal(found.cpu(), reads.table.records[reads.table.index(keys[:count])])
    assert ask.alone == (ask.by_gpu(count + slack) == count + slack)
    assert torch.equal(reads.fetch(on_device[:count]).cpu(), found.cpu())


@reuse
@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(0, 99))
def test_rows_that_a_gpu_brings_alone_go_where_they_belong(form: str, batches: list[int], seed: int) -> None:
    reads = reads_of(random_table(), *ALL)
    regions = [Region(0), Region(3)]
    table = Slots(regions, reads.table.layout.nbytes, 2 * WAYS * (reads.table.layout.nbytes + 12), KERNELS)
    generator = torch.Generator().manual_seed(seed)
    for many in batches:  # of 57 rows, for 32 places
        space = torch.randint(2, (many,), generator=generator) * 3
        rows = torch.randint(50, (many,), generator=generator) % torch.where(space == 0, 50, 7)
        keys = (space << 40 | rows).to(KERNELS)
        by_space = torch.tensor([0, -1, -1, 1], device=KERNELS)
        table.tick()
        found = table.find(SlotReads(keys, keys[:, None], table.plan(), 1, many, by_space))
        ask = HostAsk(reads, len(found.keys), ALL)
        ask.send(found.keys, found.count)
        ask.place(table, found)
        expected = reads.table.records[reads.table.index(keys.cpu())]
        assert torch.equal(pick(table.records, ask.records, found.where).cpu(), expected)
        assert not ((table.tags < 0) & (table.tags != EMPTY)).any()
        ask.check()


@pytest.mark.parametrize("first", [0, 1 << 62])
@pytest.mark.parametrize("key, message", [
    (50, "Row 50 is not in table 0, which has 50 rows"), (make_keys(3, torch.tensor(7)), "Row 7 is not in table 3"),
    (make_keys(1, torch.tensor(0)), "There is no table with number 1 here"),
    (make_keys(9, torch.tensor(0)), "There is no table with number 9 here"),
])  # fmt: skip
def test_a_row_that_is_not_there_is_named(form: str, first: int, key: int | Tensor, message: str) -> None:
    reads = reads_of(random_table(), first, 0)
    with pytest.raises(ValueError, match=message):
        reads.fetch(torch.tensor([1, int(key), 2], device=KERNELS))
    assert len(reads.fetch(torch.tensor([1, 2], device=KERNELS))) == 2
    ask = HostAsk(reads, 2, (first, 0))
    if ask.alone:  # nobody waits for it, so the next batch says so
        wanted, count = torch.tensor([1, int(key)], device=KERNELS), torch.tensor([2, 0], device=KERNELS)
        ask.send(wanted, count)
        ask.sent()
        ask.read()
        torch.cuda.synchronize() if KERNELS.type == "cuda" else None
        with pytest.raises(ValueError, match=message):
            ask.check()
        ask.check()


def test_each_way_is_measured_alone(runtime_of: Callable[[int], Runtime], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime_of(0)
    table, real = random_table(reached=True), host_reads._whole_seconds
    measured: dict[str, list[int]] = {"gpu": [], "cpu": [], "both": []}

    def by_gpu(ask: HostAsk, keys: Tensor) -> float:
        assert ask.by_gpu(len(keys)) == len(keys)
        measured["gpu"] += [len(keys)]
        return 1e-6 + 3e-6 * len(keys)

    def whole(ask: HostAsk, keys: Tensor) -> float:
        assert real(ask, keys) >= 0 and torch.equal(ask.records, table.gather(keys))
        measured["both" if ask.by_gpu(len(keys)) else "cpu"].append(len(keys))
        return both if ask.by_gpu(len(keys)) else 17e-6 + 1e-6 * len(keys)

    monkeypatch.setattr(host_reads, "_gpu_seconds", by_gpu)
    monkeypatch.setattr(host_reads, "_whole_seconds", whole)
    monkeypatch.setattr(host_reads, "_SIZES", (4, 16))
    state, both = torch.get_rng_state(), 49e-6 / 1.26
    reads = HostReads(table, CPU)
    ask = reads.new_ask(16)
    assert torch.equal(torch.get_rng_state(), state)
    assert reads._division == (4, SHARES // 4) and ask.by_gpu(5) == 5 and ask.by_gpu(16) == 8
    both = 49e-6 / 1.24  # they gain too little
    alone = HostReads(table, CPU)
    assert alone._division == ALL and alone.new_ask(10**6).alone
    monkeypatch.setattr(host_reads, "divide", lambda *_: (0, 0))
    assert reads.new_ask(16).by_gpu(16) == 0 and ask.by_gpu(16) == 8  # what was recorded of it is as it was
    assert set(measured["gpu"]) == set(measured["cpu"]) == {4, 16} and set(measured["both"]) == {16}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_any_store_can_be_asked(device: str) -> None:
    layout = RecordLayout((Plane("value", 6, "fp32"),))
    store: Store = HostStore(layout, {0: 9}, for_gpu=False)
    store.table.records.random_(256)  # type: ignore[attr-defined]
    ask = PlainAsk(store, 9, torch.device(device))
    for keys in ([3, 1, 3], [], [8]):
        ask.send(torch.tensor([*keys, 0, 0], device=device), torch.tensor([len(keys), 0], device=device))
        ask.sent()
        ask.read()
        assert torch.equal(ask.bring().cpu(), store.fetch(torch.tensor(keys, dtype=torch.int64)))
    assert isinstance(new_ask(store, 3, torch.device(device)), PlainAsk if device == "cpu" else HostAsk)
