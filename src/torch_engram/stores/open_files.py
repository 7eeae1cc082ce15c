"""Files that are held open for reading: the same bytes for as long as they are used, or an error.

A file that was deleted, or replaced by a rename, goes on being read: what is held open is the file, not its name. One
that is truncated or written to in place is refused after the next read, by its size and its time of change.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torch_engram.stores.tensor_files import TensorPlace, read_header


class OpenFile:
    """One safetensors file, open for as long as this object lives.

    Raises ``ValueError`` naming the file when it is truncated or no safetensors file, or is another one by the time
    that it is open; ``OSError`` when it cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        tensors = read_header(path)
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.identity = _identity(os.fstat(self.descriptor))
        """Device, inode, bytes and time of the last change: those of another file, or of other content, differ."""
        self.tensors: dict[str, TensorPlace] = read_header(path)
        """What its header says."""
        if self.tensors != tensors or _identity(os.stat(path)) != self.identity:
            raise ValueError(f"{path} was replaced while it was opened: open it again when it is whole.")

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.identity[2]

    def require_unchanged(self) -> None:
        """Call after every read: raises ``OSError`` naming the file when it was truncated or written to since it was
        opened, so that what was read may not be its rows."""
        if _identity(os.fstat(self.descriptor)) != self.identity:
            raise OSError(
                f"{self.path} was changed while it was in use: put the whole file back under its name by a rename, and "
                "open the table again."
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

    def _read(self, view: memoryview, at: int) -> int:
        try:
            return os.preadv(self.descriptor, [view], at)
        except OSError as error:
            raise unreadable(self.path, at, error.errno or 0) from error


def unreadable(path: Path, at: int, errno: int) -> OSError:
    """What is raised for a read that failed."""
    return OSError(errno, f"{os.strerror(errno)} at byte {at:,}: check the disk, or fetch the file again", str(path))


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
