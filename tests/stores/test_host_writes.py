"""What a GPU writes into a table in host memory: the rows and no others, in order, acknowledged when they are there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.stores import HostStore, Plane, RecordLayout, WritableCachedStore, host, host_writes, make_keys
from torch_engram.stores.host_memory import HostMemory, PrivateMemory, own_memory
from torch_engram.stores.host_reads import ALL, HostReads
from torch_engram.stores.host_writes import HostWrites
from torch_engram.stores.pages import private_memory
from torch_engram.stores.table import RecordTable

CPU = torch.device("cpu")
KERNELS = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUT = RecordLayout((Plane("value", 9, "bf16"), Plane("count", 1, "int32"), Plane("moment", 1)))
SPACES = {0: 50, 3: 7}
WIDE = RecordLayout((Plane("value", 64, "bf16"), Plane("count", 1, "int32"), Plane("moment", 1)))
reuse = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


def memory_of(size: int) -> HostMemory:
    return own_memory(size) if KERNELS.type == "cuda" else PrivateMemory(private_memory(size))


def reads_of(reached: bool) -> HostReads:
    """A GPU's, where there is one, of a table that it reaches or does not."""
    rows = sum(SPACES.values())
    memory, marks = (memory_of(rows * size) for size in (LAYOUT.nbytes, 1))
    table = RecordTable(LAYOUT, SPACES, CPU, memory if KERNELS.type == "cuda" else None, marks)
    reads = HostReads(table, KERNELS)
    reads.words, reads.marks, reads._division = table.words, table._changed, ALL
    if not reached:
        reads.words = reads.marks = None
    return reads


@pytest.fixture(params=["reached", "copied", "naive"])
def reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HostReads:
    monkeypatch.setattr(host_writes, "use_kernels", lambda tensor: request.param != "naive")
    return reads_of(request.param == "reached")


@reuse
@given(st.lists(st.tuples(st.sampled_from([0, 3]), st.sets(st.integers(0, 6)), st.integers(0, 255)), max_size=5))
def test_every_way_writes_the_rows_and_marks_them(reads: HostReads, writes: list[tuple[int, set[int], int]]) -> None:
    table, ways = reads.table, HostWrites(reads)
    table.records.zero_()
    table.forget_changes()
    twin = RecordTable(LAYOUT, SPACES, CPU)
    for space, rows, byte in writes:
        keys = make_keys(space, torch.tensor(sorted(rows), dtype=torch.int64))
        records = (torch.arange(len(keys) * LAYOUT.nbytes) + byte).view(-1, LAYOUT.nbytes).to(torch.uint8)
        carry_out = ways.begin(keys.to(KERNELS), records.to(KERNELS))
        carry_out()
        twin.scatter(keys, records)
        assert torch.equal(table.records, twin.records)
    for space in SPACES:
        assert torch.equal(table.changed(space), twin.changed(space))
    table.forget_changes()
    assert not any(len(table.changed(space)) for space in SPACES)
    HostWrites(reads).begin(torch.tensor([3], device=KERNELS), torch.zeros_like(table.records[:1], device=KERNELS))()
    assert table.changed(0).tolist() == [3], "a GPU marks where it did before"


def test_a_store_for_gpus_counts_changes_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "own_memory", memory_of)
    store = HostStore(LAYOUT, SPACES, for_gpu=True)
    marks = store.table.marks
    assert store.counts_from == 0 and marks is not None and len(marks.bytes) == 57
    for number in (1, 2):
        store.write(make_keys(3, torch.tensor([number])), LAYOUT.empty(1))
        store.flush()
        assert store.changed(3).tolist() == [number] and (marks.bytes == 1).sum() == 1
        assert store.forget_changes() == number and marks.bytes.astype(bool).sum() == number
        assert not len(store.changed(3)) and store.written(3).tolist() == list(range(1, number + 1))


def test_a_write_is_acknowledged_when_it_is_done_and_the_fifth_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    store, may_go = HostStore(LAYOUT, SPACES, for_gpu=False), threading.Semaphore(0)
    real = store.table.scatter

    def slowly(keys: Tensor, records: Tensor) -> None:
        may_go.acquire()
        real(keys, records)

    monkeypatch.setattr(store.table, "scatter", slowly)
    keys, records = torch.arange(3), torch.ones(3, LAYOUT.nbytes, dtype=torch.uint8)
    assert [store.write(keys, number * records) for number in range(1, 5)] == [1, 2, 3, 4]
    assert store.acknowledged == 0 and not store.fetch(keys).any()
    fifth = threading.Thread(target=store.write, args=(keys, 5 * records))
    fifth.start()
    fifth.join(0.05)
    assert fifth.is_alive()
    may_go.release()
    fifth.join()
    assert store.acknowledged >= 1 and (store.fetch(keys) == 1).all()
    may_go.release(4)
    store.flush()
    assert store.acknowledged == 5 and (store.fetch(keys) == 5).all()


# -- on a GPU ----------------------------------------------------------------------------------------------------------

ROWS = 1 << 18


@pytest.fixture(params=["uncached", "cached"])
def make_store(request: pytest.FixtureRequest) -> Callable[[], Any]:
    def make() -> Any:
        store = HostStore(WIDE, {0: ROWS}, for_gpu=True)
        return store if request.param == "uncached" else WritableCachedStore(store, "8MB", "cuda")

    return make


def filled(count: int, number: int) -> Tensor:
    """Records on the GPU, every word of which is ``number``."""
    return torch.full((count, WIDE.nbytes // 8), number, device="cuda").view(torch.uint8)


def words(records: Tensor) -> Tensor:
    return records.view(torch.int64)


@pytest.mark.gpu
def test_a_gpu_writes_the_rows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HostStore(WIDE, {0: ROWS}, for_gpu=True)
    monkeypatch.setattr(store.table, "scatter", lambda *_: pytest.fail("the CPU is to have no part in it"))
    store.write(torch.arange(9, device="cuda"), filled(9, 7))
    store.flush()
    assert (words(store.fetch(torch.arange(9))) == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_what_is_acknowledged_is_seen_whole_on_another_stream(make_store: Callable[[], Any], where: str) -> None:
    """A row of an acknowledged write is never torn, late or missing, while newer writes are under way."""
    store, keys, beside = make_store(), torch.arange(0, ROWS, 2, device="cuda"), torch.cuda.Stream()
    asked = keys[:: 7 if where == "cpu" else 1].to(where)
    torch.cuda.synchronize()
    for number in range(1, 41):
        assert store.write(keys, filled(len(keys), number)) == number
        with torch.cuda.stream(beside):
            seen = store.acknowledged
            found = words(store.fetch(asked))
            assert int(found.min()) >= seen and int(found.max()) <= number
    store.flush()
    assert store.acknowledged == 40 and (words(store.fetch(keys)) == 40).all()
    assert not store.fetch(keys + 1).any()
    assert torch.equal(store.changed(0), keys.cpu())


@pytest.mark.gpu
def test_writes_of_both_processors_keep_their_order(make_store: Callable[[], Any]) -> None:
    store, expected = make_store(), torch.zeros(ROWS, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 31):
        rows = torch.randperm(ROWS, generator=generator)[: ROWS // 3].sort().values
        device = "cpu" if number % 3 == 0 else "cuda"
        store.write(rows.to(device), filled(len(rows), number).to(device))
        expected[rows] = number
    store.flush()
    for where in ("cpu", "cuda"):
        found = words(store.fetch(torch.arange(ROWS, device=where))).cpu()
        assert torch.equal(found, expected[:, None].expand_as(found))


@pytest.mark.gpu
def test_a_write_waits_for_its_rows_and_keeps_them(make_store: Callable[[], Any]) -> None:
    """The rows are made on a stream that is busy, and their memory is anybody's after the write has begun."""
    store, keys, busy = make_store(), torch.arange(ROWS, device="cuda"), torch.cuda.Stream()
    store.write(keys, filled(ROWS, 1))
    store.flush()
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(1_000_000_000)
        records = filled(ROWS, 2)
        store.write(keys, records)
        assert store.acknowledged == 1
        del records
        filled(ROWS, 3)  # would take the memory of those rows if nobody held them
    store.flush()
    assert (words(store.fetch(keys)) == 2).all()
