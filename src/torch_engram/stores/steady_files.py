"""Files that must stay as they were found for as long as somebody reads them, and the rows of tensors in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from torch_engram.stores.tensor_files import TensorPlace


class ChangedFile(ValueError):
    """A file was changed, replaced or cut off since it was found."""


class Identity(NamedTuple):
    """Which file it is, and of when."""

    inode: int
    size: int
    mtime_ns: int


class SteadyFile:
    """A file, and which one it was when it was found; every read looks whether it is that one still."""

    def __init__(self, path: Path):
        self.path = path
        self.identity = _identity(os.stat(path))

    def read(self, into: Tensor, start: int) -> None:
        """Fill the contiguous tensor uint8 ``into`` with the bytes from ``start`` on.

        Raises :class:`ChangedFile` when it is another file now, or ends before, and ``OSError`` when it cannot be read.
        """
        view = into.view(-1).numpy().data
        descriptor = self._open()
        try:
            while view:  # preadv may read less than there is
                done = os.preadv(descriptor, [view], start)
                if done == 0:
                    raise self._changed()
                view, start = view[done:], start + done
        except OSError as error:
            error.filename = str(self.path)
            raise
        finally:
            os.close(descriptor)

    def read_rows(self, into: Tensor, place: TensorPlace, first: int) -> None:
        """Fill the contiguous tensor uint8 ``into`` ``[n, bytes a row]`` with rows of a tensor, from ``first`` on."""
        self.read(into, place.start + first * into.shape[1])

    def require_unchanged(self) -> None:
        """Raises :class:`ChangedFile` unless it still is the file that it was."""
        os.close(self._open())

    def _open(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise self._changed() from error
        if _identity(os.fstat(descriptor)) != self.identity:
            os.close(descriptor)
            raise self._changed()
        return descriptor

    def _changed(self) -> ChangedFile:
        return ChangedFile(f"{self.path} was changed or replaced while it was read: begin anew when nobody writes it.")


def _identity(found: os.stat_result) -> Identity:
    return Identity(found.st_ino, found.st_size, found.st_mtime_ns)
