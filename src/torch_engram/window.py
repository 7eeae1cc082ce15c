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
    taken back. One window may hold several tensors (say tokens and flags) that move together.
    """

    def __init__(self, keep: int, drafts: int = 0):
        self.keep, self.drafts = keep, drafts
        self._held: tuple[Tensor, ...] = ()
        self._forgot = False  # whether older positions were ever let go

    def __len__(self) -> int:
        """Positions that the next one can look back on."""
        return min(self._held[0].shape[1], self.keep) if self._held else 0

    def last(self) -> tuple[Tensor, ...]:
        """The tensors' last ``len(self)`` positions; empty before the first :meth:`push`."""
        return tuple(tensor[:, tensor.shape[1] - len(self) :] for tensor in self._held)

    def push(self, *chunks: Tensor) -> None:
        """Append ``[B, T, ...]`` to each tensor and let go of what is too old. Tensors are detached."""
        chunks = tuple(chunk.detach() for chunk in chunks)
        if self._held:
            chunks = tuple(torch.cat(pair, dim=1) for pair in zip(self._held, chunks, strict=True))
        excess = max(0, chunks[0].shape[1] - self.keep - self.drafts)
        self._forgot |= excess > 0
        self._held = tuple(chunk[:, excess:] for chunk in chunks)

    def select(self, sequences: Tensor) -> None:
        """See :class:`DecodeState`."""
        self._held = tuple(tensor.index_select(0, sequences.to(tensor.device)) for tensor in self._held)

    def repeat(self, times: int) -> None:
        """See :class:`DecodeState`."""
        self._held = tuple(tensor.repeat_interleave(times, dim=0) for tensor in self._held)

    def crop(self, drop: int) -> None:
        """See :class:`DecodeState`. Raises ``ValueError`` past the drafts that the window was made for."""
        left = (self._held[0].shape[1] if self._held else 0) - drop
        if self._forgot and left < self.keep:
            raise ValueError(
                f"Cannot take back {drop} positions of a state made for {self.drafts} drafts: raise drafts."
            )
        self._held = tuple(tensor[:, :left] for tensor in self._held) if left > 0 else ()

    def reset(self) -> None:
        """See :class:`DecodeState`."""
        self._held, self._forgot = (), False
