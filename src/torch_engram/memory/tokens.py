"""One micro-batch as a memory sees it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torch_engram.window import Window


@dataclass(frozen=True)
class Tokens:
    """Raw token ids int64 ``[B, T]`` and what bounds them; all optional masks are bool ``[B, T]``."""

    ids: Tensor
    doc_start: Tensor | None = None
    """True at a document's first token: no n-gram reaches across it."""
    live: Tensor | None = None
    """False at padding and image tokens: they read nothing and change no row."""
    history: Window | None = None
    """What came before in decoding, from :meth:`MemoryBank.new_history`; it is told of these tokens."""

    @property
    def is_step(self) -> bool:
        """Whether it is one position of every sequence, in decoding."""
        return self.history is not None and self.ids.shape[1:] == (1,)
