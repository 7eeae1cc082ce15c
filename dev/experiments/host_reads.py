"""How fast fresh random rows of a table in host memory reach a GPU, by how the memory was got and who reads it.

    python dev/experiments/host_reads.py [GIB [KIND ...]]

Memory: `unified`, kept on the host; `pinned` by CUDA; `mapped` and registered with CUDA, with huge pages where the
system grants them; `shared`, a file in shared memory, as several processes would share it. Readers: the GPU itself, a
warp a row, rows as they come and sorted; and threads of the CPU into a pinned buffer, which is then copied. Rows are
256 bytes, drawn anew for every launch. The rate of a plain copy over the bus stands above.
"""

from __future__ import annotations

import gc
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_engram.stores.host_memory import UnifiedMemory

WORDS, GIB = 32, 1 << 30
SIZES, REPEATS = (16_384, 262_144, 1_048_576), 5


@triton.jit
def _read(table, rows, out, count, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = (place < count)[:, None]
    word = tl.arange(0, WIDTH)[None]
    row = tl.load(rows + place, mask=place < count, other=0)[:, None]
    tl.store(
        out + place[:, None].to(tl.int64) * WIDTH + word, tl.load(table + row * WIDTH + word, mask=here), mask=here
    )


def read(table: Tensor, out: Tensor, per_program: int, rows: Tensor) -> None:
    grid = (triton.cdiv(len(rows), per_program),)
    _read[grid](table, rows, out, len(rows), WIDTH=WORDS, ROWS=per_program, num_warps=4)


def memories(size: int) -> Iterator[tuple[str, Callable[[], tuple[Tensor, Callable[[], None]]]]]:
    """How each kind of memory is made, and what undoes it."""
    yield "unified", lambda: unified(size)
    yield "pinned", lambda: (torch.empty(size // 8, dtype=torch.int64, pin_memory=True), lambda: None)
    yield "mapped", lambda: registered(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), True)
    yield "shared", lambda: registered(shared(size), True)


def unified(size: int) -> tuple[Tensor, Callable[[], None]]:
    memory = UnifiedMemory(size)
    table = torch.from_numpy(memory.reach(torch.device("cuda"))).view(torch.int64)
    table.fill_(1)
    return table, lambda: None


def shared(size: int) -> mmap.mmap:
    path = Path("/dev/shm/engram-host-reads")
    with open(path, "w+b") as file:
        os.ftruncate(file.fileno(), size)
        mapped = mmap.mmap(file.fileno(), size, mmap.MAP_SHARED)
    path.unlink()
    return mapped


def registered(mapped: mmap.mmap, huge: bool) -> tuple[Tensor, Callable[[], None]]:
    mapped.madvise(14 if huge else 15)  # MADV_HUGEPAGE, MADV_NOHUGEPAGE
    view = np.frombuffer(mapped, np.int64)
    pieces = np.array_split(view, 64)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda piece: piece.fill(1), pieces))
    table = torch.from_numpy(view)
    start = time.perf_counter()
    code = int(torch.cuda.cudart().cudaHostRegister(table.data_ptr(), table.nbytes, 2))
    print(f"  registered in {time.perf_counter() - start:.2f} s, code {code}")
    assert code == 0
    return table, lambda: torch.cuda.cudart().cudaHostUnregister(table.data_ptr())


def rate(launch: Callable[[Tensor], object], count: int, total: int, device: str, ordered: bool = False) -> list[float]:
    """GB/s of launches with rows of their own."""
    found = []
    for _ in range(REPEATS + 2):
        rows = torch.randint(total, (count,), device=device)
        rows = rows.sort().values if ordered else rows
        torch.cuda.synchronize()
        start = time.perf_counter()
        launch(rows)
        torch.cuda.synchronize()
        found.append(count * WORDS * 8 / (time.perf_counter() - start) / 1e9)
    return sorted(found[2:])


def by_gpu(
    table: Tensor,
    there: Tensor,
    count: int,
    shapes: Sequence[tuple[int, bool]] = ((4, False), (4, True), (16, False), (16, True)),
) -> None:
    for per_program, ordered in shapes:
        reader = partial(read, table, there[: count * WORDS], per_program)
        samples = rate(reader, count, len(table) // WORDS, "cuda", ordered)
        kind = "sorted" if ordered else "as drawn"
        print(
            f"  GPU, {table.nbytes / GIB:3.0f} GiB, {per_program:2} rows a program, {kind:8} {count:8}: "
            f"{samples[REPEATS // 2]:.1f} GB/s",
            flush=True,
        )


def by_cpu(table: Tensor, there: Tensor, buffer: Tensor, count: int) -> None:
    words, staged = table.view(-1, WORDS), buffer[: count * WORDS].view(count, WORDS)

    def gather(rows: Tensor) -> None:
        torch.index_select(words, 0, rows, out=staged)

    def gather_and_copy(rows: Tensor) -> None:
        gather(rows)
        there[: count * WORDS].copy_(staged.view(-1), non_blocking=True)

    for ordered in (False, True):
        both, alone = (
            rate(form, count, len(words), "cpu", ordered)[REPEATS // 2] for form in (gather_and_copy, gather)
        )
        kind = "sorted" if ordered else "as drawn"
        print(f"  CPU and copy, {kind:8} {count:8}: {both:.1f} GB/s, gather alone {alone:.1f}", flush=True)


def main() -> None:
    size = (int(sys.argv[1]) if len(sys.argv) > 1 else 24) * GIB
    torch.set_num_threads(os.cpu_count() or 1)
    for path in ("enabled", "shmem_enabled", "defrag"):
        print(path, Path(f"/sys/kernel/mm/transparent_hugepage/{path}").read_text().strip())
    buffer = torch.empty(GIB // 8, dtype=torch.int64, pin_memory=True)
    there = torch.empty(GIB // 8, dtype=torch.int64, device="cuda")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        there.copy_(buffer, non_blocking=True)
        torch.cuda.synchronize()
        bus = GIB / (time.perf_counter() - start) / 1e9
    print(f"bus copy {bus:.1f} GB/s")
    for name, make in memories(size):
        if name not in (sys.argv[2:] or name):
            continue
        print(name)
        try:
            start = time.perf_counter()
            table, undo = make()
            print(f"  made in {time.perf_counter() - start:.1f} s")
        except (AssertionError, OSError, RuntimeError, ValueError) as error:
            print(f"  not to be had: {error!r}")
            continue
        huge = [line for line in Path("/proc/meminfo").read_text().splitlines() if "Huge" in line and "kB" in line]
        print("  " + "; ".join(" ".join(line.split()) for line in huge[:3]))
        for span in (1, 4, 16):  # how large a table has to be before its pages tell
            by_gpu(table[: span * GIB // 8], there, SIZES[-1], shapes=((4, False),))
        for count in SIZES:
            by_gpu(table, there, count)
            by_cpu(table, there, buffer, count)
        undo()
        del table
        gc.collect()


if __name__ == "__main__":
    main()
