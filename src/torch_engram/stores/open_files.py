"""Files that are held open for reading: the same bytes for as long as they are used, or an error.

A file that was deleted, or replaced by a rename, goes on being read: what is held open is the file, not its name. One
that is truncated or written to in place is refused after the next read, by its size and its time of change. Who needs
the name as well asks for it.
"""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torch_engram.stores.tensor_files import TensorPlace, read_header


class ChangedFile(OSError):
    """A file is not what it was when it was opened."""


class Identity(NamedTuple):
    """Which file it is, and of when: another file's, or that of other content, differs."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class OpenFile:
    """One file, open for as long as this object lives. Raises ``OSError`` when it cannot be opened."""

    def __init__(self, path: Path):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.identity = _identity(os.fstat(self.descriptor))
        """As it was opened."""

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.identity.size

    def require_unchanged(self) -> None:
        """Call after every read: raises :class:`ChangedFile` naming the file when it was truncated or written to since
        it was opened, so that what was read may not be its rows."""
        if _identity(os.fstat(self.descriptor)) != self.identity:
            raise ChangedFile(
                f"{self.path} was changed while it was in use: put the whole file back under its name by a rename, and "
                "begin anew."
            )

    def require_in_place(self) -> None:
        """For what is said of the files under their names: as :meth:`require_unchanged`, and raises
        :class:`ChangedFile`, too, when the name is another file's by now, or nobody's."""
        self.require_unchanged()
        try:
            named = _identity(os.stat(self.path))
        except FileNotFoundError:
            named = None
        if named != self.identity:
            raise ChangedFile(
                f"{self.path} was replaced or removed while it was in use: begin anew when nobody writes it."
            )

    def read_into(self, at: int, target: NDArray[np.uint8]) -> None:
        """Fill ``target``, contiguous bytes, from byte ``at`` on. Raises ``OSError`` naming the file for a read error,
        or when it ends before."""
        view = target.data
        while view:  # a read may give less than it was asked for
            done = self._read(view, at)
            if not done:
                self.require_unchanged()
                raise OSError(f"{self.path} ends at byte {at:,}: fetch or write it again.")
            view, at = view[done:], at + done

    def is_hole(self, start: int, stop: int) -> bool:
        """Whether nobody ever wrote bytes ``start`` to ``stop``, which then read as zeros. False where the file system
        does not say. Raises :class:`ChangedFile` as :meth:`require_unchanged` does."""
        try:
            data = os.lseek(self.descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                return False
            data = self.size  # there are none up to the end
        self.require_unchanged()
        return data >= stop

    def _read(self, view: memoryview, at: int) -> int:
        try:
            return os.preadv(self.descriptor, [view], at)
        except OSError as error:
            raise unreadable(self.path, at, error.errno or 0) from error


class TensorFile(OpenFile):
    """One safetensors file, with what its header says.

    Raises ``ValueError`` naming the file when it is truncated or no safetensors file, or is another one by the time
    that it is open; ``OSError`` when it cannot be opened.
    """

    def __init__(self, path: Path):
        tensors = read_header(path)
        super().__init__(path)
        self.tensors: dict[str, TensorPlace] = read_header(path)
        """By name."""
        if self.tensors != tensors or _identity(os.stat(path)) != self.identity:
            raise ValueError(f"{path} was replaced while it was opened: open it again when it is whole.")


def unreadable(path: Path, at: int, errno: int) -> OSError:
    """What is raised for a read that failed."""
    return OSError(errno, f"{os.strerror(errno)} at byte {at:,}: check the disk, or fetch the file again", str(path))


def _identity(found: os.stat_result) -> Identity:
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
