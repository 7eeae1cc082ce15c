"""One copy of a table on a machine, whichever process needs it first: filled by one, held by many, gone with the last.

The bytes are in a memory file that has no name in any folder. It lives for as long as a process holds it, however that
process ends, so that nothing of it is left behind. Who holds it stands in a small file named by a digest of what is
held, a process and a descriptor in every line; others open the memory through the system's list of a process's files.

Whoever opens or fills it holds a lock on that small file. A filler that dies gives up the lock and the memory: there is
no half-filled one to be found, and the next process fills it anew. What is filled is sealed against changes of its
length. The small file is removed by the last holder that ends of its own accord; where that one was killed, by whoever
opens any table next.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from torch_engram.stores.host_memory import HostMemory, PrivateMemory
from torch_engram.stores.pages import Bytes, allocate_shared, map_shared, populate, private_memory, require_room
from torch_engram.stores.pinned import register

FOLDERS = (Path("/dev/shm"), Path(tempfile.gettempdir()))
"""Where the small files are: the first one that is there."""
_PREFIX = "torch-engram"
_LINE = re.compile(rb"^(\d+) (\d+) (\d+)\n", re.MULTILINE)
"""Process, descriptor and the segment's number among all files."""


class NoSharedMemory(Exception):
    """The system has no memory to share, or not enough of it."""


class Segment:
    """``size`` bytes that all processes of one user share who ask for the same ``digest``, for as long as this lives.

    ``fill`` is called with zeroed bytes when no process holds them yet; others wait until it is done. Raises
    :class:`NoSharedMemory`, ``MemoryError`` when there is no room for them, and what ``fill`` raises.
    """

    def __init__(self, digest: str, size: int, fill: Callable[[Bytes], None]):
        self.size = size
        with _refusals():
            remove_left_over()
            path = _folder() / f"{_prefix()}{digest}"
            holders = _Holders(path, wait=True)
        try:
            found = holders.open_segment()
            descriptor = _filled(holders.segment, size, fill) if found is None else found
            weakref.finalize(self, _let_go, descriptor, path)
            with _refusals():
                holders.add(descriptor)
        finally:
            holders.close()
        self.descriptor = descriptor
        with _refusals():
            self._memory = map_shared(descriptor, size, writable=False)
            populate(self._memory)
        self._reached: Bytes | None = None

    @property
    def bytes(self) -> Bytes:
        """Read-only: to write into them ends the process. They may outlive this object."""
        return self._memory

    def reach(self, device: torch.device) -> Bytes:
        """See :class:`~torch_engram.stores.host_memory.HostMemory`: a map of its own that is pinned, since drivers pin
        what is writable only; nobody writes into it."""
        if self._reached is None:
            reached = map_shared(self.descriptor, self.size, writable=True)
            register(self, reached)
            self._reached = reached
        return self._reached


def node_memory(digest: str, size: int, fill: Callable[[Bytes], None]) -> HostMemory:
    """``size`` bytes as ``fill`` fills them: of a segment, or, with a warning, of this process.

    Raises ``MemoryError`` when there is no room for them at all, and what ``fill`` raises.
    """
    try:
        return Segment(digest, size, fill)
    except NoSharedMemory as refusal:
        warnings.warn(
            f"Processes cannot share this table ({refusal}): each that opens it keeps {size / 1e9:,.1f} GB of its own.",
            stacklevel=3,
        )
    require_room(size)
    memory = private_memory(size)
    fill(memory)
    return PrivateMemory(memory)


def remove_left_over() -> None:
    """Remove the small files of segments that no process holds any more."""
    for path in _folder().glob(f"{_prefix()}*"):
        with suppress(OSError):  # in use, or removed by somebody else
            _Holders(path, wait=False).close()


class _Holders:
    """The small file of one segment, locked: who holds it. Raises ``BlockingIOError`` when it is locked and this is not
    to wait, and other ``OSError`` when it cannot be had."""

    def __init__(self, path: Path, wait: bool):
        self.path, self.segment = path, f"{_PREFIX}-{path.name.rpartition('-')[2]}"
        create = os.O_CREAT if wait else 0
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | create, 0o600)
            try:
                found = os.fstat(self._file)
                if found.st_uid != os.getuid():
                    raise PermissionError(f"{path} belongs to another user")
                fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                with suppress(FileNotFoundError):
                    if os.stat(path).st_ino == found.st_ino:
                        return
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)  # it was removed before it was locked

    def open_segment(self) -> int | None:
        """A descriptor of the segment, where a living process holds it."""
        for line in _LINE.finditer(os.pread(self._file, os.fstat(self._file).st_size, 0)):
            process, descriptor, inode = map(int, line.groups())
            link = f"/proc/{process}/fd/{descriptor}"
            with suppress(OSError):  # that process has gone
                if os.readlink(link) == f"/memfd:{self.segment} (deleted)":
                    found = os.open(link, os.O_RDWR | os.O_CLOEXEC)
                    if os.fstat(found).st_ino == inode:
                        return found
                    os.close(found)
        return None

    def add(self, descriptor: int) -> None:
        """From now on this process holds the segment, too."""
        os.write(self._file, f"{os.getpid()} {descriptor} {os.fstat(descriptor).st_ino}\n".encode())

    def close(self) -> None:
        """Give up the lock, and the file where nobody holds the segment."""
        held = self.open_segment()
        if held is None:
            self.path.unlink(missing_ok=True)
        else:
            os.close(held)
        os.close(self._file)


def _filled(name: str, size: int, fill: Callable[[Bytes], None]) -> int:
    """A descriptor of new memory as ``fill`` fills it."""
    require_room(size)
    with _refusals():
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with _refusals():
            os.ftruncate(descriptor, size)
            memory = map_shared(descriptor, size, writable=True)
            allocate_shared(descriptor, memory)
        fill(memory)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _let_go(descriptor: int, path: Path) -> None:
    os.close(descriptor)
    with suppress(OSError):  # somebody else opens it right now, or has removed it
        _Holders(path, wait=False).close()


def _prefix() -> str:
    """How the small files begin that this process can make use of: its user's, and of processes that it can see."""
    return f"{_PREFIX}-{os.getuid()}-{os.stat('/proc/self/ns/pid').st_ino}-"


def _folder() -> Path:
    return next(folder for folder in FOLDERS if folder.is_dir() and os.access(folder, os.W_OK))


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (OSError, AttributeError, MemoryError, StopIteration) as error:
        raise NoSharedMemory(str(error)) from error
