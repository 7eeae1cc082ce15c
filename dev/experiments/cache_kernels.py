"""A cache's kernels on a GPU: whether what is read is right, and what finding, filling and embedding take.

    python dev/experiments/cache_kernels.py      # without a CUDA device: the checks, by the naive forms, small

Shapes of ``deepseek-v4.1``: two layers, orders 2, 3 and 4 of 8 heads, rows of 256 numbers in FP8; a prefill of 8,192
positions, decoding of 512 sequences and of one. Each read has fresh n-grams; how many were found stands beside. The
store below is in HBM, so that what is measured is the cache, and once in host memory. By row: the same rows, each an
entry of its own. Nothing that fails ends the script.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torch_engram.bench.memory_ops import natural_ids
from torch_engram.bench.timing import copy_rate
from torch_engram.stores import (
    CODECS,
    CachedStore,
    DeviceStore,
    Heads,
    HostStore,
    NgramCache,
    Plane,
    RecordLayout,
    RowFormat,
    Store,
    WritableCachedStore,
)
from torch_engram.stores.slots import EMPTY, WAYS

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LAYERS, ORDERS, HEADS, DIM = (0, 1), 3, 8, 256
ROWS_A_HEAD = 150_000 if GPU else 50
SPACES = dict.fromkeys(LAYERS, ORDERS * HEADS * ROWS_A_HEAD)
SIZES = (8192, 512, 1)


def layout_of(codec: str, dim: int = DIM) -> RecordLayout:
    return RecordLayout((Plane("value", dim, codec),))


def random_store(layout: RecordLayout, host: bool = False) -> DeviceStore | HostStore:
    store = HostStore(layout, SPACES, for_gpu=GPU) if host else DeviceStore(layout, SPACES, DEVICE)
    records = store.table.records
    for start in range(0, len(records), 2**20):
        part = records[start : start + 2**20]
        part.copy_(torch.randint(256, part.shape, dtype=torch.uint8, device=DEVICE))
    return store


def rows_of(mixes: Tensor) -> Tensor:
    """Rows int64 ``[S, n, 24]`` that follow from mixes ``[S, n, 3]``."""
    column = torch.arange(ORDERS * HEADS, device=DEVICE)
    hashed = mixes.repeat_interleave(HEADS, dim=-1) * (2 * column + 1) >> 7 & (2**40 - 1)
    return hashed % ROWS_A_HEAD + column * ROWS_A_HEAD


def fresh(positions: int) -> tuple[Tensor, Tensor]:
    """Mixes of natural text, about, and their rows."""
    reads = len(LAYERS) * positions * ORDERS
    mixes = natural_ids(reads, 2**62, DEVICE).view(len(LAYERS), positions, ORDERS)
    return mixes, rows_of(mixes)


def keys_of(rows: Tensor) -> Tensor:
    return (rows + (torch.arange(len(rows), device=DEVICE) << 40)[:, None, None]).flatten()


def cache_of(store: Store, budget: int | str) -> NgramCache:
    return NgramCache(
        store, [Heads(layer, (HEADS,) * ORDERS) for layer in LAYERS], RowFormat(store.layout), budget, DEVICE
    )


def attempt(name: str, work: Callable[[], object]) -> None:
    try:
        work()
    except Exception:
        print(f"FAILED {name}\n{traceback.format_exc(limit=-4)}", flush=True)


# -- checks ----------------------------------------------------------------------------------------------------------


def check_reads(codec: str, dim: int, dtype: torch.dtype, positions: int, sets: int) -> None:
    layout = layout_of(codec, dim)
    store = random_store(layout)
    cache = cache_of(store, sets * len(LAYERS) * ORDERS * WAYS * (HEADS * layout.nbytes + 12))
    for _ in range(4):
        mixes, rows = fresh(positions)
        out = torch.full((len(LAYERS), positions, ORDERS * HEADS * dim), torch.nan, dtype=dtype, device=DEVICE)
        cache.read(LAYERS, mixes, rows, out)
        keys = keys_of(rows)
        wanted = RowFormat(layout).decode(keys, store.fetch(keys))["value"].to(dtype).view(out.shape)
        torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    tags = cache._slots.tags.view(-1, WAYS).sort(1)[0]
    assert not ((tags < 0) & (tags != EMPTY)).any(), "something is left claimed"
    assert not ((tags[:, 1:] == tags[:, :-1]) & (tags[:, 1:] != EMPTY)).any(), "a set has a tag twice"
    total = torch.tensor([list(line.values()) for line in cache.counts().values()]).sum(0).tolist()
    assert sum(total[:3]) == 4 * mixes.numel(), total
    print(f"right: {codec} of {dim} to {dtype}, {positions} positions, {sets} sets: {total}", flush=True)


def check_writes(times: int) -> None:
    layout = layout_of("bf16", 19)
    mine, plain = random_store(layout), DeviceStore(layout, SPACES, DEVICE)
    plain.table.records.copy_(mine.table.records)
    cache = WritableCachedStore(mine, times * len(LAYERS) * WAYS * (layout.nbytes + 12), DEVICE)
    for _ in range(6):
        keys = keys_of(fresh(300 if GPU else 9)[1])
        assert torch.equal(cache.fetch(keys), plain.fetch(keys)), "a row is stale"
        written = keys[::3].unique()
        records = torch.randint(256, (len(written), layout.nbytes), dtype=torch.uint8, device=DEVICE)
        for store in (cache, plain):
            store.write(written, records)
        assert torch.equal(cache.fetch(keys), plain.fetch(keys)), "a row is stale after a write"
    print(f"right: reads and writes by row, {times} sets a space: {cache.counts()}", flush=True)


# -- times -----------------------------------------------------------------------------------------------------------


def found_share(before: dict[tuple[int, int], dict[str, int]], after: dict[tuple[int, int], dict[str, int]]) -> float:
    hits, reads = (
        sum(after[region][what] - before[region][what] for region in after for what in names)
        for names in (("hits",), ("hits", "repeats", "misses"))
    )
    return hits / max(1, reads)


def kernels_of(work: Callable[[int], object], times: int) -> dict[str, float]:
    """Mean microseconds of a call in each kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for number in range(times):
            work(number)
        torch.cuda.synchronize()
    events = [event for event in found.key_averages() if event.device_time_total]
    return {event.key: event.device_time_total / times for event in events}


def wall(work: Callable[[int], object], times: int) -> tuple[float, float]:
    """Median and 99th percentile, in microseconds, of a call and the wait for the device."""
    took = []
    for number in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work(number)
        torch.cuda.synchronize()
        took.append(1e6 * (time.perf_counter() - start))
    took.sort()
    return took[len(took) // 2], took[min(len(took) - 1, len(took) * 99 // 100)]


def report(
    name: str, cache: NgramCache | CachedStore, work: Callable[[int], object], times: int, moved: dict[str, float]
) -> None:
    """``moved``: bytes that a call moves at least in each kernel."""
    for number in range(3):
        work(number)
    before = cache.counts()
    middle, late = wall(work, times)
    share = found_share(before, cache.counts())
    print(f"{name}: found {share:.2f}; p50 {middle:.0f} us, p99 {late:.0f} us", flush=True)
    for kernel, took in sorted(kernels_of(work, min(times, 20)).items(), key=lambda item: -item[1])[:9]:
        known = next((size for part, size in moved.items() if kernel.startswith(part)), None)
        rate = f", {known / took / 1e3:,.0f} GB/s" if known else ""
        print(f"    {kernel[:60]:60} {took:9.1f} us{rate}", flush=True)


def time_ngrams(cache: NgramCache, below: str, positions: int, again: bool) -> None:
    """``again``: every read has been read before, so that all is found."""
    times = 100 if positions < 1000 else 20
    batches = [fresh(positions) for _ in range(5 if again else 2 * times + 30)]
    out = torch.empty(len(LAYERS), positions, ORDERS * HEADS * DIM, dtype=torch.bfloat16, device=DEVICE)
    if again:
        for mixes, rows in batches:
            cache.read(LAYERS, mixes, rows, out)
    rows = len(LAYERS) * positions * ORDERS * HEADS
    moved = {
        "_probe": rows / HEADS * (8 + WAYS * 8 + 4 + 8),
        "_embed": rows * (DIM + DIM // 32 + 2 * DIM) + rows / HEADS * 8,
    }
    number = iter(range(10**9))
    name = f"{below}, {'all found' if again else 'fresh'}, {positions} positions"
    report(name, cache, lambda _: cache.read(LAYERS, *batches[next(number) % len(batches)], out), times, moved)


def time_rows(cache: CachedStore, positions: int) -> None:
    times = 20
    batches = [keys_of(fresh(positions)[1]) for _ in range(2 * times + 30)]
    rows = len(batches[0])
    moved = {"_probe": rows * (8 + WAYS * 8 + 4 + 8), "_collect": rows * 2 * cache.layout.nbytes}
    number = iter(range(10**9))
    report(f"by row, fresh, {positions} positions", cache, lambda _: cache.fetch(batches[next(number)]), times, moved)


def warmed(cache: NgramCache, batches: int) -> NgramCache:
    out = torch.empty(len(LAYERS), 8192, ORDERS * HEADS * DIM, dtype=torch.bfloat16, device=DEVICE)
    for _ in range(batches):
        cache.read(LAYERS, *fresh(8192), out)
    return cache


def by_ngram() -> None:
    cache = warmed(cache_of(random_store(layout_of("fp8")), "8GB"), 100)
    for positions in SIZES:
        for again in (True, False):
            attempt("n-grams", partial(time_ngrams, cache, "HBM", positions, again))


def by_row() -> None:
    cache = CachedStore(random_store(layout_of("fp8")), "8GB", DEVICE)
    for _ in range(100):
        cache.fetch(keys_of(fresh(8192)[1]))
    for positions in SIZES[:2]:
        attempt("rows", partial(time_rows, cache, positions))


def on_host() -> None:
    cache = warmed(cache_of(random_store(layout_of("fp8"), host=True), "8GB"), 30)
    for positions in SIZES[:2]:
        attempt("host", partial(time_ngrams, cache, "host memory", positions, False))


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name() if GPU else "CPU", torch.__version__, flush=True)
    many = 2048 if GPU else 20
    for codec in (name for name in CODECS if name != "int32"):
        attempt(codec, partial(check_reads, codec, DIM if GPU else 40, torch.bfloat16, many, 4000 if GPU else 40))
    attempt("odd", partial(check_reads, "fp8", 33, torch.float32, many // 2 + 1, 7))
    attempt("overflow", partial(check_reads, "fp8", 33, torch.float16, many, 1))
    for sets in (1, 500):
        attempt("writes", partial(check_writes, sets))
    if GPU:
        print(f"copy in HBM {copy_rate() / 1e6:,.0f} GB/s, read and write", flush=True)
        for measure in (by_ngram, by_row, on_host):
            attempt(measure.__name__, measure)


if __name__ == "__main__":
    main()
