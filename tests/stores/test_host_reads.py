"""The ways from host memory to a GPU: the same rows by all of them, alone and together, and none that is not there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.stores import HostStore, Plane, RecordLayout, Store, host_asks, host_reads, make_keys, staging
from torch_engram.stores.asks import PlainAsk, new_ask
from torch_engram.stores.host_asks import SHARES, HostAsk
from torch_engram.stores.host_reads import HostReads, break_even
from torch_engram.stores.staging import Staging
from torch_engram.stores.table import RecordTable

CPU = torch.device("cpu")
KERNELS = torch.device("cuda" if torch.cuda.is_available() else "cpu")
reuse = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


def random_table(rows: int = 50, width: int = 6, pinned: bool = False) -> RecordTable:
    table = RecordTable(RecordLayout((Plane("value", width, "fp32"),)), {0: rows, 3: 7}, CPU, pinned=pinned)
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


@pytest.mark.parametrize("direct, staged, expected", [
    ([1, 2, 9], [3, 4, 5], 30), ([1, 5, 9], [3, 4, 5], 20), ([4, 5, 9], [3, 4, 5], 10), ([9, 1, 9], [3, 4, 5], 30),
    ([1, 2, 3], [3, 4, 5], sys.maxsize),
])  # fmt: skip
def test_staging_begins_where_it_is_quicker_from_there_on(
    direct: list[float], staged: list[float], expected: int
) -> None:
    assert break_even([10, 20, 30], direct, staged) == expected


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
        monkeypatch.setattr(host_reads, "_timed", lambda reads, keys: 1.0)
        return runtime

    return make


def memory_of(table: RecordTable) -> Any:
    return table.records.numpy().reshape(-1)


def reads_of(table: RecordTable, staged_from: int, share: int) -> HostReads:
    """Reads by both ways, on a GPU where there is one."""
    if KERNELS.type == "cuda":
        table = RecordTable(table.layout, table.spaces, CPU, pinned=True)
        table.records.random_(256)
    reads = HostReads(table, KERNELS)
    reads.words, reads.staged_from, reads.share = table.words, staged_from, share
    return reads


def test_a_table_that_cannot_be_pinned_is_gathered_by_the_cpu_with_a_warning(runtime_of: Any) -> None:
    runtime_of(2)
    table, keys = random_table(), torch.tensor([3, 1, 49])
    with pytest.warns(UserWarning, match=r"cannot be pinned \(CUDA error 2 for 0\.0 GB\): the CPU gathers") as caught:
        reads = HostReads(table, CPU, lambda: memory_of(table))
    assert len(caught) == 1 and reads.words is None and reads.by_gpu(1) == 0
    for _ in range(2):
        assert torch.equal(reads.fetch(keys), table.records[keys])
    with pytest.warns(UserWarning, match=r"cannot be pinned \(CUDA error 2 for 0\.0 GB\): copies to GPUs are slower"):
        unpinned = random_table(pinned=True)
    assert not unpinned.pinned


def test_a_table_is_pinned_as_long_as_it_is_read(runtime_of: Any) -> None:
    runtime, table = runtime_of(0), random_table()
    reads = [HostReads(table, CPU, lambda: memory_of(table))]
    assert runtime.pinned == [memory_of(table).ctypes.data] and reads[0].words is not None
    reads.clear()
    assert not runtime.pinned
    tables = [random_table(pinned=True)]
    assert tables[0].pinned and runtime.pinned == [memory_of(tables[0]).ctypes.data]
    tables.clear()
    assert not runtime.pinned


@reuse
@given(st.integers(0, 40), st.sampled_from([0, 1, 20, 2**62]), st.sampled_from([0, 96, SHARES]), st.integers(0, 9))
def test_a_batch_divided_in_any_way_has_its_rows(
    form: str, count: int, staged_from: int, share: int, slack: int
) -> None:
    reads = reads_of(random_table(), staged_from, share)
    ask = HostAsk(reads, count + slack)
    for seed in range(2):  # an ask serves one batch after the other
        generator = torch.Generator().manual_seed(seed)
        keys = torch.cat((torch.randint(50, (count,), generator=generator), torch.full((slack,), -1)))
        keys[: count // 2] = make_keys(3, keys[: count // 2] % 7)
        on_device = keys.to(KERNELS)
        ask.send(on_device, torch.tensor([count], device=KERNELS))
        ask.sent()
        ask.read_beside()
        found = ask.bring()
        assert torch.equal(found.cpu(), reads.table.records[reads.table.index(keys[:count])])
    assert ask.alone == (reads.by_gpu(count + slack) == count + slack)
    assert torch.equal(reads.fetch(on_device[:count]).cpu(), found.cpu())


@pytest.mark.parametrize("staged_from", [0, sys.maxsize])
@pytest.mark.parametrize("key, message", [
    (50, "Row 50 is not in table 0, which has 50 rows"), (make_keys(3, torch.tensor(7)), "Row 7 is not in table 3"),
    (make_keys(1, torch.tensor(0)), "There is no table with number 1 here"),
    (make_keys(9, torch.tensor(0)), "There is no table with number 9 here"),
])  # fmt: skip
def test_a_row_that_is_not_there_is_named(form: str, staged_from: int, key: int | Tensor, message: str) -> None:
    reads = reads_of(random_table(), staged_from, 0)
    with pytest.raises(ValueError, match=message):
        reads.fetch(torch.tensor([1, int(key), 2], device=KERNELS))
    assert len(reads.fetch(torch.tensor([1, 2], device=KERNELS))) == 2


def test_the_ways_are_measured_with_rows_that_are_there(
    runtime_of: Callable[[int], Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime_of(0)
    table, tried = random_table(), list[tuple[int, int, int]]()

    def timed(reads: HostReads, keys: Tensor) -> float:
        tried.append((len(keys), reads.staged_from, reads.share))
        assert torch.equal(reads.fetch(keys), table.gather(keys))
        by_gpu = reads.by_gpu(len(keys))
        return by_gpu + 3.0 if by_gpu == len(keys) else max(by_gpu, len(keys) - by_gpu) / 2 + 4

    monkeypatch.setattr(host_reads, "_timed", timed)
    monkeypatch.setattr(host_reads, "_SIZES", (1, 4, 16))
    monkeypatch.setattr(host_reads, "_SHARED", (2, 16))
    reads = HostReads(table, CPU, lambda: memory_of(table))
    assert reads.staged_from == 4 and reads.share == 3 * SHARES // 8
    assert {size for size, *_ in tried} == {1, 4, 16}
    monkeypatch.setattr(host_reads, "_MOST_SECONDS", -1.0)
    reads = HostReads(table, CPU, lambda: memory_of(table))
    assert reads.staged_from == sys.maxsize and reads.share == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_any_store_can_be_asked(device: str) -> None:
    layout = RecordLayout((Plane("value", 6, "fp32"),))
    store: Store = HostStore(layout, {0: 9}, pinned=False)
    store.table.records.random_(256)  # type: ignore[attr-defined]
    ask = PlainAsk(store, 9, torch.device(device))
    for keys in ([3, 1, 3], [], [8]):
        ask.send(torch.tensor([*keys, 0, 0], device=device), torch.tensor([len(keys)], device=device))
        ask.sent()
        ask.read()
        assert torch.equal(ask.bring().cpu(), store.fetch(torch.tensor(keys, dtype=torch.int64)))
    assert isinstance(new_ask(store, 3, torch.device(device)), PlainAsk if device == "cpu" else HostAsk)
