"""Files that survive a kill and a power cut: written beside, synced, renamed; and folders with one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_PIECE = 1 << 22


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` that takes its place when the block ends, and is gone when the block raises.

    Several may replace one path at once: the last one wins, whole. Raises ``OSError`` when the disk is full.
    """
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def is_left_over(path: Path, name: str) -> bool:
    """Whether ``path`` is what a killed :func:`replacing` of a file called ``name`` left beside it."""
    return re.fullmatch(rf"{re.escape(name)}\.[0-9a-f]{{8}}\.tmp", path.name) is not None


def make_folder(folder: Path) -> None:
    """Make ``folder`` where it is not there, in the midst of others that make and remove it: it may be gone by now.

    Raises ``OSError`` when it cannot be made, as when a file has its name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # something else has its name, or it was removed before anybody could see that it is one
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise


@contextmanager
def alone_in(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold ``folder`` against other processes of this machine; a killed one holds nothing.

    Raises ``BlockingIOError`` when another holds it and this one is not to wait, and ``FileNotFoundError`` when whoever
    held it has removed it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            error.filename = str(folder)
            raise
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` by ``content``."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def sync(path: Path) -> None:
    """Fsync a file, or a folder: what was renamed into a folder is on the disk only then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_room(folder: Path, size: int, what: str) -> None:
    """Raises ``ValueError`` when the disk of ``folder``, which is there or is to be made, has fewer bytes left."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise ValueError(f"{folder} has {free / 1e9:,.1f} GB left, and {what} takes more: choose another folder.")


def file_digest(path: Path, tell: Callable[[int], None] | None = None) -> str:
    """sha256 of a file; ``tell`` is called with the bytes of every piece that was read.

    Raises ``OSError`` when it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            if tell is not None:
                tell(len(piece))
    return digest.hexdigest()
