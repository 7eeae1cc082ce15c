"""Caches in front of stores: never a stale row, whatever is written when, and the counts say what was fetched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_ways import tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.stores import (
    CachedStore,
    DeviceStore,
    DiskStore,
    Heads,
    HostStore,
    NgramCache,
    Plane,
    RecordLayout,
    RowFormat,
    Store,
    WritableCachedStore,
    WritableStore,
    cached,
    make_keys,
    ngram_cache,
)
from torch_engram.stores.slots import WAYS
from torch_engram.stores.synthetic import synthesise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUT = RecordLayout((Plane("value", 5, "fp8"), Plane("count", 1, "int32")))
SPACES = {0: 40, 2: 30}
TINY = len(SPACES) * WAYS * (LAYOUT.nbytes + 12)
reuse = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "fetch", "flush"]), st.sampled_from([0, 2]), st.integers(1, 30)), max_size=25
)


def filled(records: Tensor, byte: int) -> Tensor:
    return torch.full_like(records, byte % 256)


@reuse
@given(STEPS, st.integers(0, 99))
@pytest.mark.parametrize("where", ["host", "late-1", "late-7"])
@pytest.mark.parametrize("times", [1, 30])
def test_never_a_row_older_than_what_is_acknowledged(
    stores: Mapping[str, Any], where: str, times: int, steps: list[tuple[str, int, int]], seed: int
) -> None:
    """Every record tells the epoch it was written at; a fetch may see a newer write, never an older one."""
    torch.manual_seed(seed)
    made = stores[where](LAYOUT, SPACES, DEVICE) if where != "host" else HostStore(LAYOUT, SPACES, for_gpu=False)
    store = cached(made, times * TINY, "cpu")
    assert isinstance(store, WritableCachedStore)
    written: dict[int, list[int]] = {}
    for what, space, rows in steps:
        keys = make_keys(space, torch.randperm(30)[:rows])
        if what == "write":
            epoch = store.write(keys, filled(LAYOUT.empty(rows), newest(written) + 1))
            for key in keys.tolist():
                written.setdefault(key, []).append(epoch)
        elif what == "fetch":
            check_fresh(store, keys, written)
        else:
            store.flush()
    check_fresh(store, torch.cat([make_keys(space, torch.arange(30)) for space in SPACES]), written)


def newest(written: Mapping[int, list[int]]) -> int:
    """The newest epoch."""
    return max((epochs[-1] for epochs in written.values()), default=0)


def check_fresh(store: WritableCachedStore, keys: Tensor, written: Mapping[int, list[int]]) -> None:
    seen = store.acknowledged
    for key, record in zip(keys.tolist(), store.fetch(keys).tolist(), strict=True):
        mine = written.get(key, [])
        oldest = max((epoch for epoch in mine if epoch <= seen), default=0)
        assert len(set(record)) == 1 and record[0] in (0, *mine) and record[0] >= oldest, (key, record, mine, seen)


class Meanwhile:
    """A host store in whose fetch something happens: before the rows are read, or after."""

    def __init__(self, before: bool):
        self.inner, self.before = HostStore(LAYOUT, SPACES, for_gpu=False), before
        self.layout, self.spaces, self.grouped = self.inner.layout, self.inner.spaces, False
        self.then: Callable[[], object] = int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def acknowledged(self) -> int:
        return self.inner.acknowledged

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        if self.before:
            self.then()
        records = self.inner.fetch(keys)
        if not self.before:
            self.then()
        return records


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("flushes", [True, False])
def test_what_is_written_while_rows_are_fetched_is_in_the_cache_then(before: bool, flushes: bool) -> None:
    inner = Meanwhile(before)
    store, keys = WritableCachedStore(inner, 30 * TINY, "cpu"), make_keys(2, torch.arange(20))

    def write() -> None:
        inner.then = int
        store.write(keys[5:15], filled(LAYOUT.empty(10), 7))
        if flushes:
            store.flush()

    inner.then = write
    store.fetch(keys)
    store.flush()
    expected = torch.zeros(20, dtype=torch.uint8)
    expected[5:15] = 7
    for _ in range(2):
        assert torch.equal(store.fetch(keys)[:, 0], expected)
    assert store.counts()[2, 0]["hits"] == 40


def test_reads_and_writes_on_several_threads() -> None:
    """Writers give rows ever larger numbers; no reader ever sees one shrink below what was acknowledged before."""
    store, stop = WritableCachedStore(HostStore(LAYOUT, SPACES, for_gpu=False), TINY, "cpu"), threading.Event()
    failures: list[object] = []

    def read(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        while not stop.is_set():
            keys = make_keys(0, torch.randperm(40, generator=generator)[:25])
            seen = store.acknowledged
            records = store.fetch(keys)
            if int(records.min()) < seen:
                failures.append((seen, records))

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for reader in readers:
        reader.start()
    for number in range(1, 200):
        assert store.write(make_keys(0, torch.arange(40)), filled(LAYOUT.empty(40), number)) == number
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures


def test_a_fetch_that_fails_leaves_no_trace() -> None:
    inner = Meanwhile(before=True)
    store, keys = WritableCachedStore(inner, 30 * TINY, "cpu"), make_keys(0, torch.arange(20))
    store.write(keys, filled(LAYOUT.empty(20), 3))
    store.flush()

    def fail() -> None:
        inner.then = int
        raise OSError("no more disk")

    store.fetch(keys[:4])
    inner.then = fail
    with pytest.raises(OSError, match="no more disk"):
        store.fetch(keys)
    assert bool((store.fetch(keys) == 3).all())
    assert store.counts()[0, 0]["hits"] == 8


def test_a_read_only_store_stays_one() -> None:
    class Frozen:
        layout, spaces, grouped = LAYOUT, SPACES, False

        def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
            return LAYOUT.empty(len(keys), keys.device)

    store = cached(Frozen(), "1MB", DEVICE)
    front = ngram_cache(Frozen(), [Heads(0, (1,))], RowFormat(LAYOUT), "1MB", DEVICE)
    for made in (store, front):
        assert isinstance(made, Store) and not isinstance(made, WritableStore)
    assert type(store) is CachedStore and type(front) is NgramCache
    keys = make_keys(2, torch.arange(9, device=DEVICE))
    assert not store.fetch(keys).any() and not store.fetch(keys).any()
    assert store.counts()[2, 0] == dict(hits=9, repeats=0, misses=9, evictions=0, overflow=0)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "fp8", "int8"])
@pytest.mark.parametrize("times", [1, 60])
def test_tables_in_files_behind_caches(
    disk_store_of: Callable[..., DiskStore], tmp_path: Path, codec: str, times: int
) -> None:
    """By row and by n-gram, the bytes and the numbers of the files."""
    synthesise(tmp_path / "table", "plain", 300, 20, codec)
    store = disk_store_of(tables(tmp_path / "table"))
    least = WAYS * (3 * store.layout.nbytes + 12)
    by_row, row_format = cached(store, times * least, "cpu"), RowFormat(store.layout)
    by_ngram = ngram_cache(store, [Heads(0, (3,))], row_format, times * least, "cpu")
    for _ in range(3):
        mixes = torch.randint(80, (1, 40, 1))
        rows = (mixes * 7 + torch.tensor([0, 5, 11])) % 300
        keys = make_keys(0, rows.flatten())
        expected = store.fetch(keys)
        assert torch.equal(by_row.fetch(keys), expected)
        out = by_ngram.read((0,), mixes, rows, torch.full((1, 40, 60), torch.nan))
        assert torch.equal(out.view(-1, 20), row_format.decode(keys, expected)["value"])
    assert by_row.counts()[0, 0]["hits"] and by_ngram.counts()[0, 0]["hits"]


# -- by n-gram ---------------------------------------------------------------------------------------------------------

HEADS = [Heads(0, (2, 1), first_row=0), Heads(2, (2, 1), first_row=1000)]
LEAST = 4 * WAYS * (2 * LAYOUT.nbytes + 12)


def reads_of(positions: int, distinct: int) -> tuple[Tensor, Tensor]:
    """Mixes ``[2, n, 2]`` and rows ``[2, n, 3]``, which follow from them; heads of different n-grams collide."""
    mixes = torch.randint(distinct, (2, positions, 2), device=DEVICE)
    rows = (mixes[..., [0, 0, 1]] * torch.tensor([3, 5, 7], device=DEVICE)) % 30
    return mixes, rows + torch.tensor([0, 1000], device=DEVICE)[:, None, None]


def values_of(store: Store, row_format: RowFormat, rows: Tensor) -> Tensor:
    keys = rows - torch.tensor([0, 1000], device=DEVICE)[:, None, None]
    keys = (keys | torch.tensor([0, 2 << 40], device=DEVICE)[:, None, None]).flatten()
    return row_format.decode(keys, store.fetch(keys))["value"].view(2, -1, 15)


@reuse
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), max_size=6), st.integers(0, 99))
@pytest.mark.parametrize("times", [1, 30])
@pytest.mark.parametrize("std", [0.0, 0.5])
def test_a_read_is_the_rows_decoded(times: int, std: float, batches: list[tuple[int, int]], seed: int) -> None:
    """Also rows that were never written, and rows that were written between two reads."""
    torch.manual_seed(seed)
    row_format = RowFormat(LAYOUT, seed=4, init_std=std)
    store = ngram_cache(DeviceStore(LAYOUT, SPACES, DEVICE), HEADS, row_format, times * LEAST, DEVICE)
    for number, (positions, distinct) in enumerate(batches):
        mixes, rows = reads_of(positions, distinct)
        out = torch.full((2, positions, 15), torch.nan, device=DEVICE)
        assert store.read((0, 2), mixes, rows, out) is out
        expected = values_of(store.store, row_format, rows)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        alone = torch.full_like(out[:1], torch.nan)
        torch.testing.assert_close(store.read((2,), mixes[1:], rows[1:], alone), expected[1:], rtol=0, atol=0)
        if number % 2:
            keys = make_keys(number // 2 % 2 * 2, torch.randperm(30)[:9]).to(DEVICE)
            planes = {"value": torch.randn(9, 5, device=DEVICE), "count": torch.ones(9, 1, device=DEVICE)}
            store.write(keys, row_format.encode(keys, planes))


def test_an_n_gram_is_fetched_once() -> None:
    asked = []

    class Counting(DeviceStore):
        def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
            asked.append(len(keys))
            return super().fetch(keys)

    store = ngram_cache(Counting(LAYOUT, SPACES, DEVICE), HEADS, RowFormat(LAYOUT), 30 * LEAST, DEVICE)
    mixes, rows = reads_of(50, 8)
    for _ in range(2):
        store.read((0, 2), mixes, rows, torch.empty(2, 50, 15, device=DEVICE))
    distinct = [[len(mixes[space, :, order].unique()) for order in range(2)] for space in range(2)]
    assert asked == [sum(2 * two + one for two, one in distinct)]
    for number, space in enumerate((0, 2)):
        for order in range(2):
            many = distinct[number][order]
            assert store.counts()[space, order] == dict(
                hits=50, repeats=50 - many, misses=many, evictions=0, overflow=0
            )
