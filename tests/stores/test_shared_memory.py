"""Memory that processes share: one copy, filled once, whole or not there, and gone with the last that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from torch_engram.stores import pages, shared_memory
from torch_engram.stores.host_memory import PrivateMemory
from torch_engram.stores.pages import HUGE, Bytes, private_memory, require_room
from torch_engram.stores.shared_memory import NoSharedMemory, Segment, node_memory, remove_left_over

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
SIZE = HUGE + 12_345


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files of a test's own."""
    monkeypatch.setattr(shared_memory, "FOLDERS", (tmp_path,))
    return tmp_path


def fill(memory: Bytes) -> None:
    assert not memory.any() and len(memory) == SIZE
    memory[:] = np.arange(SIZE) % 251


def is_whole(memory: Bytes) -> bool:
    return bool((memory == np.arange(SIZE) % 251).all())


def never(memory: Bytes) -> None:
    raise AssertionError("it is filled already")


def process(work: Callable[[], object]) -> int:
    """A real process that does ``work`` and ends at once, without being asked to clean up."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def ended_well(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.fixture
def steps() -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """A pipe between processes: say that something was reached, and wait until it was."""
    read, write = os.pipe()
    yield lambda: (os.write(write, b"."), None)[1], lambda: (os.read(read, 1), None)[1]
    os.close(read)
    os.close(write)


def hold(reached: Callable[[], None], fill: Callable[[Bytes], None] = fill) -> None:
    segment = Segment("a", SIZE, fill)
    assert is_whole(segment.bytes)
    reached()
    time.sleep(60)


def test_processes_share_one_copy(folder: Path) -> None:
    held = [Segment("a", SIZE, fill)]
    one = os.fstat(held[0].descriptor)

    def share() -> None:
        second = Segment("a", SIZE, never)
        assert os.fstat(second.descriptor).st_ino == one.st_ino
        assert is_whole(second.bytes)

    assert all(ended_well(child) for child in [process(share) for _ in range(3)])
    share()
    assert os.fstat(held[0].descriptor).st_blocks == one.st_blocks <= 2 * HUGE // 512
    held.append(Segment("b", SIZE, fill))
    assert os.fstat(held[1].descriptor).st_ino != one.st_ino
    assert len(list(folder.iterdir())) == 2
    held.clear()
    assert not list(folder.iterdir())


def test_a_filler_that_is_killed_leaves_nothing_that_is_used(steps: tuple[Callable[[], None], ...]) -> None:
    reached, wait = steps

    def half(memory: Bytes) -> None:
        memory[: SIZE // 2] = 9
        reached()
        time.sleep(60)

    for _ in range(3):
        child = process(lambda: Segment("a", SIZE, half))
        wait()
        kill(child)
    assert is_whole(Segment("a", SIZE, fill).bytes)


def test_others_wait_for_the_filler_and_take_over_when_it_is_killed(steps: tuple[Callable[[], None], ...]) -> None:
    reached, wait = steps

    def slow(memory: Bytes) -> None:
        reached()
        time.sleep(60)

    filler = process(lambda: Segment("a", SIZE, slow))
    wait()
    waiting = [process(lambda: hold(reached)) for _ in range(2)]
    time.sleep(0.1)
    kill(filler)
    wait()
    wait()  # one has filled it, with what it found to be zeros, and the other one has it too
    inodes = {os.stat(f"/proc/{child}/fd/{held_by(child)}").st_ino for child in waiting}
    assert len(inodes) == 1
    for child in waiting:
        kill(child)


def held_by(child: int) -> str:
    """The descriptor by which a process holds the segment."""
    files = os.listdir(f"/proc/{child}/fd")
    return next(n for n in files if "memfd:torch-engram-a" in os.readlink(f"/proc/{child}/fd/{n}"))


def test_a_holder_that_is_killed_harms_nobody(folder: Path, steps: tuple[Callable[[], None], ...]) -> None:
    reached, wait = steps
    filler = process(lambda: hold(reached))
    wait()
    mine = Segment("a", SIZE, never)
    kill(filler)
    assert is_whole(mine.bytes)
    later = process(lambda: hold(reached, never))  # which finds it by what this process holds
    wait()
    memory = mine.bytes
    del mine
    assert is_whole(memory)  # what is mapped stays
    assert is_whole(Segment("a", SIZE, never).bytes)
    kill(later)
    assert len(list(folder.iterdir())) == 1
    assert is_whole(Segment("a", SIZE, fill).bytes)  # the last one has gone, and the memory with it


def test_what_the_killed_leave_behind_is_a_line_and_is_removed(
    folder: Path, steps: tuple[Callable[[], None], ...]
) -> None:
    reached, wait = steps
    child = process(lambda: hold(reached))
    wait()
    remove_left_over()
    (left,) = folder.iterdir()
    assert left.stat().st_size < 100
    kill(child)
    left.write_bytes(b"garbage\n\xff 1 2\n" + left.read_bytes() + b"12 3")
    locked = os.open(left, os.O_RDWR)
    fcntl.flock(locked, fcntl.LOCK_EX)
    remove_left_over()  # somebody is at work on it
    assert left.exists()
    os.close(locked)
    Segment("b", SIZE, fill)
    assert not left.exists()


def test_a_process_that_took_the_number_of_a_holder_is_not_taken_for_it(folder: Path) -> None:
    segment = Segment("a", SIZE, fill)
    (listed,) = folder.iterdir()
    for name in ("torch-engram-a", "another"):
        other = os.memfd_create(name)
        inode = os.fstat(segment.descriptor).st_ino
        listed.write_text(f"{os.getpid()} {other} {inode}\n{os.getpid()} 0 {inode}\n999999999 3 {inode}\n")
        assert is_whole(Segment("a", SIZE, fill).bytes)
        os.close(other)


def test_two_fillers_at_once_fill_once(folder: Path) -> None:
    counted = folder / "count"

    def counting(memory: Bytes) -> None:
        with open(counted, "a") as file:
            file.write("x")
        fill(memory)

    def work() -> None:
        reading, writing = barriers
        segment = Segment("a", SIZE, counting)
        assert is_whole(segment.bytes)
        os.close(writing)
        os.read(reading, 1)  # until the others have it too

    for _ in range(2):
        barriers = os.pipe()
        children = [process(work) for _ in range(3)]
        os.close(barriers[1])
        assert all(ended_well(child) for child in children)
        os.close(barriers[0])
        assert counted.read_text() == "x"
        counted.unlink()


def test_what_fill_raises_is_raised_and_leaves_nothing(folder: Path) -> None:
    def fails(memory: Bytes) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    with pytest.raises(OSError, match="the disk is broken"), warnings.catch_warnings():
        node_memory("a", SIZE, fails)
    assert not list(folder.iterdir())
    assert is_whole(Segment("a", SIZE, fill).bytes)


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["memory", "memory files", "folder", "lines"])
def test_without_memory_to_share_every_process_has_its_own_with_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "memory":
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    elif what == "memory files":
        monkeypatch.delattr(os, "memfd_create")
    elif what == "folder":
        monkeypatch.setattr(shared_memory, "FOLDERS", (folder / "none",))
    else:
        monkeypatch.setattr(os, "write", refuse)
    with pytest.warns(UserWarning, match=r"cannot share this table \(.*keeps 0\.0 GB of its own") as caught:
        memory = node_memory("a", SIZE, lambda memory: memory.fill(7))
    assert len(caught) == 1 and isinstance(memory, PrivateMemory) and (memory.bytes == 7).all()
    with pytest.raises(NoSharedMemory):
        Segment("a", SIZE, fill)
    assert not list(folder.iterdir())


def test_another_users_small_file_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: user)
    (folder / f"{shared_memory._prefix()}a").touch()
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert is_whole(node_memory("a", SIZE, fill).bytes)


def test_pages_are_huge_where_the_system_grants_it_and_whole_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Segment("a", SIZE, fill)
    asked = pages._LIBC.madvise
    assert segment.bytes.ctypes.data % HUGE == 0 and is_whole(segment.bytes)
    monkeypatch.setattr(pages._LIBC, "madvise", lambda *_: -1)
    assert is_whole(Segment("b", SIZE, fill).bytes)
    assert not private_memory(SIZE).any()
    monkeypatch.setattr(pages._LIBC, "madvise", asked)


def test_memory_is_spread_over_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, calls = tmp_path / "has_memory", list[tuple[int, ...]]()
    monkeypatch.setattr(pages, "_NODES", nodes)
    monkeypatch.setattr(pages._LIBC, "syscall", lambda *arguments: calls.append(tuple(a.value for a in arguments)))
    for listed, count in (("0", 0), ("", 0), ("0-1,64", 1)):
        nodes.write_text(listed + "\n")
        private_memory(SIZE)
        assert len(calls) == count
    monkeypatch.undo()
    monkeypatch.setattr(pages, "_memory_nodes", lambda: [0, 0])  # a real call, which is harmless with one node
    memory = private_memory(SIZE)
    memory[:] = 5
    assert (memory == 5).all()


def test_memory_that_the_system_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1 << 50, 1 << 60):
        with pytest.raises(MemoryError, match=r"GB are wanted and [\d,.]+ are free"):
            node_memory("a", size, never)
    monkeypatch.setattr(pages, "free_memory", lambda: 1_500_000)
    require_room(1_500_000)
    with pytest.raises(MemoryError, match=r"0\.0 GB are wanted and 0\.0 are free"):
        require_room(1_500_001)
    monkeypatch.setattr(pages, "free_memory", lambda: None)
    require_room(1 << 60)
    with pytest.raises(MemoryError, match="bytes cannot be mapped"):
        private_memory(1 << 60)
