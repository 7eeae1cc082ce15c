"""Which way of reading random rows of a file is the quickest, cached and cold, page cache and O_DIRECT.

    python dev/experiments/disk_reads.py FILE [GIB]

Makes FILE of random bytes where it is not there, and reads distinct random rows of 256 bytes out of it by every way
that was considered, in turns; three rounds, the median. Every way fills one buffer, and what it holds is checked.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

ROW, BLOCK = 256, 4096
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
SQE = np.dtype([
    ("opcode", "u1"), ("flags", "u1"), ("ioprio", "u2"), ("fd", "i4"), ("off", "u8"), ("addr", "u8"), ("len", "u4"),
    ("rw_flags", "u4"), ("user_data", "u8"), ("buf_index", "u2"), ("personality", "u2"), ("splice", "i4"),
    ("pad", "u8", 2),
])  # fmt: skip
IOCB = np.dtype([
    ("data", "u8"), ("key", "u4"), ("rw_flags", "u4"), ("opcode", "u2"), ("prio", "i2"), ("fd", "u4"), ("buf", "u8"),
    ("nbytes", "u8"), ("offset", "i8"), ("reserved", "u8"), ("flags", "u4"), ("resfd", "u4"),
])  # fmt: skip
EVENT = np.dtype([("data", "u8"), ("obj", "u8"), ("res", "i8"), ("res2", "i8")])
IOVEC = np.dtype([("base", "u8"), ("len", "u8")])

Reader = Callable[[int, np.ndarray, np.ndarray, int], None]
"""Reads ``size`` bytes at every offset of a descriptor to an address each."""


def call(number: int, *arguments: object) -> int:
    done = LIBC.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


class Uring:
    """Batches of reads through io_uring, each waited for whole."""

    def __init__(self, entries: int):
        parameters = (ctypes.c_uint32 * 30)()
        self.entries, self.fd = entries, call(425, entries, ctypes.byref(parameters))
        p = list(parameters)
        sq, cq = p[10:20], p[20:30]
        size = max(sq[6] + entries * 4, cq[5] + p[1] * 16)
        self.ring = mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self.sqes = np.frombuffer(mmap.mmap(self.fd, entries * 64, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE,
                                            offset=0x10000000), SQE)  # fmt: skip
        words = np.frombuffer(self.ring, np.uint32)
        self.sq_tail, self.cq_head = words[sq[1] // 4 :][:1], words[cq[0] // 4 :][:1]
        words[sq[6] // 4 : sq[6] // 4 + entries] = np.arange(entries)
        self.cqes = np.frombuffer(self.ring, np.dtype([("data", "u8"), ("res", "i4"), ("flags", "u4")]), p[1], cq[5])

    def __call__(self, fd: int, offsets: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """See :data:`Reader`."""
        for start in range(0, len(offsets), self.entries):
            part = slice(start, start + self.entries)
            n, at = len(offsets[part]), int(self.sq_tail[0])
            slots = (at + np.arange(n)) % self.entries
            batch = np.zeros(n, SQE)
            batch["opcode"], batch["fd"], batch["off"], batch["addr"], batch["len"] = (
                22, fd, offsets[part], addresses[part], size)  # fmt: skip
            self.sqes[slots] = batch
            self.sq_tail[0] = (at + n) & 0xFFFFFFFF
            assert call(426, self.fd, n, n, 1, None, 0) == n
            head = int(self.cq_head[0])
            assert (self.cqes["res"][(head + np.arange(n)) % len(self.cqes)] == size).all()
            self.cq_head[0] = (head + n) & 0xFFFFFFFF


class Aio:
    """Batches of reads through Linux AIO, each waited for whole."""

    def __init__(self, entries: int):
        self.entries, context = entries, ctypes.c_ulong(0)
        call(206, entries, ctypes.byref(context))
        self.context, self.events = context.value, np.zeros(entries, EVENT)

    def __call__(self, fd: int, offsets: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """See :data:`Reader`."""
        for start in range(0, len(offsets), self.entries):
            part = slice(start, start + self.entries)
            n = len(offsets[part])
            batch = np.zeros(n, IOCB)
            batch["fd"], batch["buf"], batch["nbytes"], batch["offset"] = fd, addresses[part], size, offsets[part]
            pointers = batch.ctypes.data + np.arange(n) * IOCB.itemsize
            done = 0
            while done < n:
                done += call(209, self.context, n - done, ctypes.c_void_p(pointers.ctypes.data + 8 * done))
            done = 0
            while done < n:
                done += call(
                    208, self.context, n - done, n - done, ctypes.c_void_p(self.events[done:].ctypes.data), None
                )
            assert (self.events["res"][:n] == size).all()


def pool(threads: int) -> Reader:
    workers = ThreadPoolExecutor(threads)

    def read(fd: int, offsets: np.ndarray, addresses: np.ndarray, size: int) -> None:
        whole = (ctypes.c_char * (int(addresses.max() - addresses.min()) + size)).from_address(int(addresses.min()))
        view, base = memoryview(whole), int(addresses.min())

        def some(part: slice) -> None:
            for offset, at in zip(offsets[part].tolist(), (addresses[part] - base).tolist(), strict=True):
                assert os.preadv(fd, [view[at : at + size]], offset) == size

        step = -(-len(offsets) // threads)
        list(workers.map(some, [slice(s, s + step) for s in range(0, len(offsets), step)]))

    return read


class FromMap:
    """Rows out of a read-only map, copied by the kernel, which gives EFAULT where a load would end the process: 1,024
    rows a call, by ``process_vm_readv`` of this very process, or by ``pwritev`` into a memory file that is the buffer.

    ``ahead``: the pages of a call are asked for before; ``always``, or ``after`` a call that waited for the disk.
    """

    def __init__(self, path: Path, memory: tuple[int, int] | None, ahead: str, threads: int):
        self.memory, self.ahead = memory, ahead
        self.fd = os.open(path, os.O_RDONLY)
        self.map = mmap.mmap(self.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self.map.madvise(mmap.MADV_RANDOM)
        self.base = np.frombuffer(self.map, np.uint8).ctypes.data
        self.workers = ThreadPoolExecutor(threads)
        self.waited = ahead == "always"

    def __call__(self, fd: int, offsets: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """See :data:`Reader`."""
        list(self.workers.map(partial(self.some, offsets, addresses, size), range(0, len(offsets), 1024)))

    def some(self, offsets: np.ndarray, addresses: np.ndarray, size: int, start: int) -> None:
        """One call's rows."""
        part = offsets[start : start + 1024]
        if self.waited:
            for at in np.unique(part // BLOCK * BLOCK).tolist():
                os.posix_fadvise(self.fd, at, BLOCK, os.POSIX_FADV_WILLNEED)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
        vectors = np.zeros(len(part), IOVEC)
        vectors["base"], vectors["len"] = self.base + part, size
        at = ctypes.c_void_p(vectors.ctypes.data)
        if self.memory is not None:
            descriptor, base = self.memory
            done = call(296, descriptor, at, len(part), int(addresses[start]) - base, 0)
        else:
            into = np.array([(addresses[start], len(part) * size)], IOVEC)
            done = call(310, os.getpid(), ctypes.c_void_p(into.ctypes.data), 1, at, len(part), 0)
        assert done == len(part) * size
        if self.ahead == "after":
            self.waited = self.waited or resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before > 8

    def forget(self) -> None:
        """Let the pages go that are mapped, and begin anew."""
        self.map.madvise(mmap.MADV_DONTNEED)  # pages that are mapped would stay in the page cache
        self.waited = self.ahead == "always"


class Gather:
    """Rows out of a read-only map by loads: what a truncated file would end the process by."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY)
        self.map = mmap.mmap(self.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self.map.madvise(mmap.MADV_RANDOM)
        self.table = np.frombuffer(self.map, f"V{ROW}")

    def __call__(self, fd: int, offsets: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """See :data:`Reader`."""
        whole = (ctypes.c_char * (len(offsets) * size)).from_address(int(addresses.min()))
        np.frombuffer(whole, f"V{ROW}")[:] = self.table[offsets // ROW]

    def forget(self) -> None:
        """Let the pages go that are mapped."""
        self.map.madvise(mmap.MADV_DONTNEED)


def make(path: Path, nbytes: int) -> None:
    if path.exists() and path.stat().st_size == nbytes:
        return
    with open(path, "wb") as file:
        for number in range(nbytes >> 26):
            file.write(np.random.default_rng(number).bytes(1 << 26))
        os.fsync(file.fileno())


@contextmanager
def timed(times: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


def main() -> None:
    path, nbytes = Path(sys.argv[1]), int(float(sys.argv[2]) * 2**30) if len(sys.argv) > 2 else 4 << 30
    make(path, nbytes)
    rows = nbytes // ROW
    memory = os.memfd_create("rows")
    os.ftruncate(memory, (1 << 20) * BLOCK)
    target = np.frombuffer(mmap.mmap(memory, (1 << 20) * BLOCK), np.uint8)
    base = target.ctypes.data
    cached, direct = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY | os.O_DIRECT)
    rng = np.random.default_rng(int(time.time()))

    def one(reader: Reader, count: int, is_direct: bool) -> float:
        wanted = np.sort(rng.choice(rows, count, replace=False)).astype(np.int64)
        offsets, size, fd = wanted * ROW, ROW, cached
        if is_direct:
            offsets, size, fd = np.unique(offsets // BLOCK) * BLOCK, BLOCK, direct
        addresses = base + np.arange(len(offsets), dtype=np.int64) * size
        target[: len(offsets) * size] = 0
        times: list[float] = []
        with timed(times):
            reader(fd, offsets, addresses, size)
        some = rng.integers(0, len(offsets), 100)
        if size == ROW:
            assert all(target[i * ROW :][:ROW].tobytes() == os.pread(cached, ROW, offsets[i]) for i in some)
        return len(offsets) / times[0]

    def drop() -> None:
        for way in maps.values():
            way.forget()
        os.posix_fadvise(cached, 0, 0, os.POSIX_FADV_DONTNEED)

    def fill() -> None:
        buffer = bytearray(1 << 24)
        for at in range(0, nbytes, len(buffer)):
            os.preadv(cached, [buffer], at)

    ways: dict[str, tuple[Reader, bool]] = {}
    for entries in (128, 1024):
        ways[f"io_uring, {entries} a batch"] = Uring(entries), True
        ways[f"AIO, {entries} a batch"] = Aio(entries), True
    for threads in (8, 32):
        ways[f"preadv, {threads} threads"] = pool(threads), True
    maps: dict[str, FromMap | Gather] = {}
    for threads in (1, 2):
        for ahead in ("always", "after"):
            maps[f"pwritev from a map, {threads} threads, {ahead}"] = FromMap(path, (memory, base), ahead, threads)
            maps[f"process_vm_readv, {threads} threads, {ahead}"] = FromMap(path, None, ahead, threads)
    maps["gather from a map (may end by SIGBUS)"] = Gather(path)
    for name, way in maps.items():
        ways[name] = way, False
    print(f"# {platform.platform()}, python {platform.python_version()}, numpy {np.__version__}")
    print(f"# {os.cpu_count()} cores, shared: {os.getloadavg()[1]:.1f} processes wanted them when this began")
    print(f"{nbytes >> 30} GiB of {ROW}-byte rows, rows or 4 KiB blocks a second, median of 3")
    print(f"{'way':<42}{'cached':>12}{'cold':>12}{'O_DIRECT':>12}")
    found: dict[str, list[list[float]]] = {name: [[], [], []] for name in ways}
    for _ in range(3):
        fill()
        for name, (reader, _) in ways.items():
            one(reader, 1 << 19, False)  # maps have most of their pages by then
            found[name][0].append(one(reader, 1 << 19, False))
        for name, (reader, can) in ways.items():
            drop()
            found[name][1].append(one(reader, 1 << 15, False))
            if can:
                found[name][2].append(one(reader, 1 << 16, True))
    for name, columns in found.items():
        cells = [f"{statistics.median(column):>12,.0f}" if column else f"{'-':>12}" for column in columns]
        print(f"{name:<42}{''.join(cells)}")


if __name__ == "__main__":
    main()
