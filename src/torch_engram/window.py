"""The last positions of every sequence: the one shape of state that decoding with a memory needs.

Hashing needs the last N-1 tokens of a sequence, the short convolution its last (k-1)·dilation inputs. Both keep
them in a :class:`Window` and so both follow what a key-value cache does to its sequences, through the same
:class:`DecodeState` protocol: select (a beam's reorder is a select), repeat, crop and reset.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

_ROOM = 64
"""Positions that a window may take in before its tensors are made anew."""


class DecodeState(Protocol):
    """What a cache may do to the sequences that it holds."""

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences (int64 ``[B']``), in this order; an index may come twice."""

    def repeat(self, times: int) -> None:
        """Each sequence ``times`` times, copies next to each other (as for beams or several samples)."""

    def crop(self, drop: int) -> None:
        """Take back the last ``drop`` positions (rejected drafts)."""

    def reset(self) -> None:
        """Forget everything: the next position is a sequence's first."""


class States(ABC):
    """States that move together: a :class:`DecodeState` of its parts."""

    @abstractmethod
    def _parts(self) -> Iterable[DecodeState]:
        """Those that may refuse a crop come first, so that nothing has been cropped then."""

    def select(self, sequences: Tensor) -> None:
        """See :class:`DecodeState`."""
        for part in self._parts():
            part.select(sequences)

    def repeat(self, times: int) -> None:
        """See :class:`DecodeState`."""
        for part in self._parts():
            part.repeat(times)

    def crop(self, drop: int) -> None:
        """See :class:`DecodeState`. Raises ``ValueError`` past the drafts that its parts were made for."""
        for part in self._parts():
            part.crop(drop)

    def reset(self) -> None:
        """See :class:`DecodeState`."""
        for part in self._parts():
            part.reset()


class Window:
    """Tensors ``[B, L, ...]`` of the last L = min(seen, keep + drafts) positions.

    ``keep`` positions are what a computation looks back on; ``drafts`` more are held so that as many can be
    taken back. One window may hold several tensors (say tokens and flags) that move together. They have room, so that a
    position that is added is written and the others stay where they are.
    """

    def __init__(self, keep: int, drafts: int = 0):
        self.keep, self.drafts = keep, drafts
        self._room: tuple[Tensor, ...] = ()
        """``[B, R, ...]``, of which positions ``_first`` to ``_end`` are held."""
        self._first = self._end = 0
        self._forgot = False  # whether older positions were ever let go

    def __len__(self) -> int:
        """Positions that the next one can look back on."""
        return min(self._end - self._first, self.keep)

    @property
    def sequences(self) -> int:
        """B; 0 before the first :meth:`push`."""
        return len(self._room[0]) if self._room else 0

    def last(self) -> tuple[Tensor, ...]:
        """The tensors' last ``len(self)`` positions, as views that hold until the next change; empty before the first
        :meth:`push`."""
        return tuple(tensor[:, self._end - len(self) : self._end] for tensor in self._room)

    def push(self, *chunks: Tensor) -> None:
        """Append ``[B, T, ...]`` to each tensor and let go of what is too old. Tensors are copied, without a graph."""
        most, added = self.keep + self.drafts, chunks[0].shape[1]
        self._forgot |= self._end - self._first + added > most
        chunks = tuple(chunk.detach()[:, max(0, added - most) :] for chunk in chunks)
        self._make_room(chunks, chunks[0].shape[1])
        self._grow(chunks[0].shape[1])
        for tensor, chunk in zip(self._room, chunks, strict=True):
            tensor[:, self._end - chunk.shape[1] : self._end] = chunk

    def beyond(self) -> tuple[Tensor, ...]:
        """Of a window that is not empty, the tensors' last ``len(self)`` positions and one that is yet to come, which
        the caller may fill before :meth:`advance`, as views ``[B, len(self) + 1, ...]`` that hold until the next
        change."""
        seen = len(self)
        self._make_room(self._room, 1)
        return tuple(tensor[:, self._end - seen : self._end + 1] for tensor in self._room)

    def advance(self) -> tuple[Tensor, ...]:
        """Move on by one position: what :meth:`beyond` gives, whose last is the caller's to fill if it has not."""
        views = self.beyond()
        self._forgot |= self._end - self._first >= self.keep + self.drafts
        self._grow(1)
        return views

    def _make_room(self, like: tuple[Tensor, ...], added: int) -> None:
        """Let ``added`` positions fit behind those held, in tensors as those ``like`` them."""
        assert not self._room or len(like[0]) == len(self._room[0]), "a window holds the same sequences until select()"
        first, end = self._first, self._end
        if not self._room or end + added > self._room[0].shape[1] or not _can_write(self._room[0]):
            held = tuple(tensor[:, first:end] for tensor in self._room)
            self._room = tuple(each.new_empty(len(each), end - first + added + _ROOM, *each.shape[2:]) for each in like)
            for tensor, before in zip(self._room, held, strict=False):
                tensor[:, : end - first] = before
            self._first, self._end = 0, end - first

    def _grow(self, added: int) -> None:
        """Hold ``added`` positions more, and let go of what is too old."""
        self._end += added
        self._first = max(self._first, self._end - self.keep - self.drafts)

    def select(self, sequences: Tensor) -> None:
        """See :class:`DecodeState`."""
        self._replace(tensor.index_select(0, sequences.to(tensor.device)) for tensor in self._held())

    def repeat(self, times: int) -> None:
        """See :class:`DecodeState`."""
        self._replace(tensor.repeat_interleave(times, dim=0) for tensor in self._held())

    def _held(self) -> tuple[Tensor, ...]:
        return tuple(tensor[:, self._first : self._end] for tensor in self._room)

    def _replace(self, held: Iterable[Tensor]) -> None:
        self._room, self._first, self._end = tuple(held), 0, self._end - self._first

    def crop(self, drop: int) -> None:
        """See :class:`DecodeState`. Raises ``ValueError`` past the drafts that the window was made for."""
        left = self._end - self._first - drop
        if self._forgot and left < self.keep:
            raise ValueError(
                f"Cannot take back {drop} positions of a state made for {self.drafts} drafts: raise drafts."
            )
        self._end -= drop
        if left <= 0:
            self._room, self._first, self._end = (), 0, 0

    def reset(self) -> None:
        """See :class:`DecodeState`."""
        self._room, self._first, self._end, self._forgot = (), 0, 0, False


def _can_write(tensor: Tensor) -> bool:
    """What was made in inference mode is written in it alone."""
    return not tensor.is_inference() or torch.is_inference_mode_enabled()
