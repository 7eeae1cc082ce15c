"""Tokens to n-gram windows to rows: everything that is known about a lookup before any network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_engram.addressing import hashing
from torch_engram.addressing.canonical import CanonicalVocab
from torch_engram.addressing.layout import LayerLayout, layouts
from torch_engram.addressing.steps import StepHashes
from torch_engram.config import EngramConfig
from torch_engram.kernels import use_kernels
from torch_engram.window import Window

if TYPE_CHECKING:
    from torch_engram.addressing.address_kernels import Hashes


class Lookup:
    """What some tokens read, from :meth:`Addressing.lookup`: ``find`` gives a layer's mixes ``[B, T, N-1]`` and row ids
    ``[B, T, C]``. ``together``: those of ``layers``, stacked, where all are found already."""

    def __init__(
        self,
        find: Callable[[int], tuple[Tensor, Tensor]],
        layers: Iterable[int] = (),
        together: tuple[Tensor, Tensor] | None = None,
    ):
        self._find, self._layers, self._together = find, tuple(layers), together

    def __call__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mixes and row ids of one layer."""
        return self._find(layer)

    def of(self, layers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Mixes ``[L, B, T, N-1]`` and row ids ``[L, B, T, C]`` of some layers."""
        if self._together is not None and tuple(layers) == self._layers:
            return self._together
        mixes, rows = zip(*map(self._find, layers), strict=True)
        return torch.stack(mixes), torch.stack(rows)


class Addressing:
    """Row ids from token ids, for one memory, on any device.

    ``vocab`` maps raw ids to canonical ones and is required by scheme ``engram``; ``qwen_ple`` hashes raw ids.
    ``stored``: a checkpoint's layouts, which are then used as they are; without them they are derived.
    Raises ``ValueError`` when the vocabulary is absent or of another size than the configuration says.
    """

    def __init__(
        self,
        config: EngramConfig,
        vocab: CanonicalVocab | None = None,
        stored: Mapping[int, LayerLayout] | None = None,
    ):
        self.config = config
        self.vocab = vocab if config.scheme == "engram" else None
        if config.scheme == "engram" and vocab is None:
            raise ValueError("Scheme 'engram' hashes canonical ids: pass vocab=CanonicalVocab.of(tokenizer).")
        if self.vocab is not None and self.vocab.size != config.vocab_size:
            raise ValueError(
                f"EngramConfig.vocab_size is {config.vocab_size}, the tokenizer has {self.vocab.size} canonical ids: "
                f"use the tokenizer that the memory was made with, or set vocab_size={self.vocab.size}."
            )
        self.raw_size = self.vocab.raw_size if self.vocab is not None else config.vocab_size
        if config.pad_id >= self.raw_size:
            raise ValueError(f"EngramConfig.pad_id is {config.pad_id}: the vocabulary ends at {self.raw_size - 1}.")
        self.pad = int(self.vocab.ids[config.pad_id]) if self.vocab is not None else config.pad_id
        self.layouts: dict[int, LayerLayout] = dict(stored) if stored is not None else layouts(config)
        self._constants: dict[tuple[int | None, torch.device], tuple[Tensor, ...]] = {}
        self._reducers: dict[tuple[int, torch.device], Callable[[Tensor], Tensor]] = {}
        self._hashes: dict[torch.device, Hashes] = {}
        self._steps: StepHashes | None = None

    def new_history(self, drafts: int = 0) -> Window:
        """An empty history for decoding: each sequence's last N-1 tokens, document starts and dead flags."""
        return Window(self.config.max_ngram - 1, drafts)

    def windows(
        self,
        tokens: Tensor,
        *,
        history: Window | None = None,
        doc_start: Tensor | None = None,
        live: Tensor | None = None,
    ) -> Tensor:
        """Canonical n-gram windows int64 ``[B, T, N]``, newest id first, blocked positions as the pad.

        ``tokens``: raw ids ``[B, T]``. ``history``: what came before, and is told of these tokens. ``doc_start``:
        bool ``[B, T]``, True at a document's first token. ``live``: bool ``[B, T]``, False at padding and image
        tokens. Raises ``ValueError`` for an id outside the vocabulary.
        """
        self.require_alike(tokens, doc_start, live)
        self.require_known(tokens)
        if history is None and doc_start is None and live is None and self.config.scheme == "engram":
            return self._slide(tokens)  # nothing ends a segment but the sequence
        chunk = _flagged(tokens, doc_start, live)
        seen = _in_context(history, chunk)
        if history is not None:
            history.push(*chunk)
        return self._gather(*seen)[:, seen[0].shape[1] - tokens.shape[1] :]

    def lookup(
        self,
        tokens: Tensor,
        *,
        history: Window | None = None,
        doc_start: Tensor | None = None,
        live: Tensor | None = None,
        with_mixes: bool = True,
    ) -> Lookup:
        """:meth:`windows`, then :meth:`rows` for the layers that are asked for.

        On a GPU one kernel finds the rows of all layers now, and a step of decoding is found now anywhere; otherwise
        each layer's are found when it is asked for, so that the first need not wait for the last. ``with_mixes=False``
        allows mixes ``[B, T, 0]`` in place of theirs. Raises ``ValueError`` as :meth:`windows` does, now.
        """
        if use_kernels(tokens):
            return self._lookup_at_once(tokens, history, doc_start, live, with_mixes)
        if history is not None and tokens.device.type == "cpu" and tokens.shape == (history.sequences, 1):
            return self._lookup_step(tokens, history, doc_start, live)
        windows = self.windows(tokens, history=history, doc_start=doc_start, live=live)
        return Lookup(partial(self.rows, windows))

    def _lookup_at_once(
        self, tokens: Tensor, history: Window | None, doc_start: Tensor | None, live: Tensor | None, with_mixes: bool
    ) -> Lookup:
        """:meth:`lookup` with the kernel, on any device that can run it."""
        from torch_engram.addressing.address_kernels import address_triton

        self.require_alike(tokens, doc_start, live)
        chunk = _flagged(tokens, doc_start, live)
        going_on = history if history is not None and tokens.shape == (history.sequences, 1) else None
        seen = _in_context(history, chunk) if going_on is None else _written_beyond(going_on, chunk)
        context = seen[0].shape[1] - tokens.shape[1]
        stranger = torch.zeros(1, dtype=torch.bool, device=tokens.device)
        mixes, rows = address_triton(*seen, context, self._hashes_on(tokens.device), with_mixes, stranger)
        if stranger.item():  # the one time that this thread waits for the device
            self.require_known(tokens)
        if going_on is not None:
            going_on.advance()
        elif history is not None:
            history.push(*chunk)
        return self._found(mixes, rows)

    def _lookup_step(self, tokens: Tensor, history: Window, doc_start: Tensor | None, live: Tensor | None) -> Lookup:
        """:meth:`lookup` of one position on a CPU, whose sequences go on."""
        self.require_alike(tokens, doc_start, live)
        self.require_known(tokens)
        seen, start, dead = (held.numpy() for held in history.advance())
        seen[:, -1:] = tokens.numpy()
        start[:, -1:] = False if doc_start is None else doc_start.numpy(force=True)
        dead[:, -1:] = False if live is None else ~live.numpy(force=True)
        if self._steps is None:
            ids = None if self.vocab is None else self.vocab.ids.numpy()
            self._steps = StepHashes.of(self.layouts.values(), ids, self.pad)
        mixes, rows = (torch.from_numpy(found)[:, :, None] for found in self._steps.rows(seen, start, dead))
        return self._found(mixes, rows)

    def _found(self, mixes: Tensor, rows: Tensor) -> Lookup:
        """Those of all layers ``[L, B, T, ...]``."""
        place = {layer: number for number, layer in enumerate(self.layouts)}
        return Lookup(lambda layer: (mixes[place[layer]], rows[place[layer]]), self.layouts, (mixes, rows))

    def rows_at_once(
        self, tokens: Tensor, start: Tensor, dead: Tensor, context: int, stranger: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mixes ``[L, B, T, N-1]`` and row ids ``[L, B, T, C]`` of all layers, on a GPU, by one kernel that waits for
        nothing and may be captured.

        ``tokens``: raw ids ``[B, context + T]``, whose first ``context`` are looked back on. ``start``, ``dead``: bool,
        alike: document starts, and tokens that no n-gram sees. ``stranger``: bool ``[1]``, in memory that the GPU
        reaches, becomes True where a token is outside the vocabulary; what is returned for it then means nothing.
        """
        from torch_engram.addressing.address_kernels import address_triton

        return address_triton(tokens, start, dead, context, self._hashes_on(tokens.device), True, stranger)

    def _hashes_on(self, device: torch.device) -> Hashes:
        from torch_engram.addressing.address_kernels import Hashes

        if device not in self._hashes:
            ids = self._map(device) if self.vocab is not None else None
            self._hashes[device] = Hashes.of(self.layouts.values(), ids, self.raw_size, self.pad, device)
        return self._hashes[device]

    def _gather(self, tokens: Tensor, start: Tensor, dead: Tensor) -> Tensor:
        """Windows of whole sequences: a position sees back to its segment's start and no further."""
        begins = start.clone()
        begins[:, 1:] |= dead[:, :-1]
        if self.config.scheme == "qwen_ple":  # a segment ends after each EOS
            begins[:, 1:] |= tokens[:, :-1] == self.config.pad_id
        windows, begins = self._slide(tokens), F.pad(begins, (self.config.max_ngram - 1, 0))
        blocked = dead
        for age, ids in enumerate(windows.unbind(-1)):
            ids.masked_fill_(blocked, self.pad)
            seen = begins[:, begins.shape[1] - age - tokens.shape[1] : begins.shape[1] - age]
            blocked = blocked | seen  # once one is blocked, all older ones are
        return windows

    def _slide(self, tokens: Tensor) -> Tensor:
        """Raw ids ``[B, T]`` to canonical windows ``[B, T, N]`` that see back to the sequence's start."""
        windows = tokens.new_empty(self.config.max_ngram, *tokens.shape)
        newest, length = windows[0], tokens.shape[1]
        if self.vocab is None:
            newest.copy_(tokens)
        else:
            torch.index_select(self._map(tokens.device), 0, tokens.flatten(), out=newest.view(-1))
        for age in range(1, self.config.max_ngram):
            windows[age, :, :age] = self.pad
            windows[age, :, age:] = newest[:, : max(0, length - age)]
        return windows.movedim(0, -1)  # each age's ids lie together in memory

    def rows(self, windows: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Windows ``[B, T, N]`` to mixes ``[B, T, N-1]`` and row ids ``[B, T, C]`` of one layer, offsets added."""
        multipliers, offsets, *primes = self._layer(layer, windows.device)
        if (layer, windows.device) not in self._reducers:
            self._reducers[layer, windows.device] = hashing.reducer(tuple(primes), offsets)
        mix = hashing.mixes(windows, multipliers)
        return mix, self._reducers[layer, windows.device](mix)

    @staticmethod
    def require_alike(tokens: Tensor, doc_start: Tensor | None = None, live: Tensor | None = None) -> None:
        """Raises ``ValueError`` unless ids are int64 ``[B, T]`` and masks bool, alike."""
        for name, given in (("tokens", tokens), ("doc_start", doc_start), ("live", live)):
            if given is not None and (given.ndim != 2 or given.shape != tokens.shape):
                raise ValueError(
                    f"{name} has the shape {list(given.shape)}: tokens and their masks are [B, T], all alike."
                )
            if given is not None and given.dtype != (torch.int64 if name == "tokens" else torch.bool):
                kind = "int64" if name == "tokens" else "bool"
                raise ValueError(f"{name} is {given.dtype}: make it {kind}, with .to(torch.{kind}).")

    def require_known(self, tokens: Tensor) -> None:
        """Raises ``ValueError`` for an id outside the vocabulary. Waits for the device."""
        if tokens.numel() == 0:
            return
        on_host = tokens.device.type == "cpu"  # NumPy takes a third of the time for a chunk of a prompt
        low, high = map(int, (tokens.numpy().min(), tokens.numpy().max()) if on_host else torch.aminmax(tokens))
        if low < 0 or high >= self.raw_size:
            raise ValueError(
                f"Token id {low if low < 0 else high} is outside this memory's vocabulary of {self.raw_size} ids: "
                "use the tokenizer that the memory was made with."
            )

    def _map(self, device: torch.device) -> Tensor:
        if (None, device) not in self._constants:
            assert self.vocab is not None
            self._constants[None, device] = (self.vocab.ids.to(device),)
        return self._constants[None, device][0]

    def _layer(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """Multipliers ``[N]``, offsets ``[C]`` and each order's primes ``[H]`` on ``device``."""
        if (layer, device) not in self._constants:
            layout = self.layouts[layer]
            values = (layout.multipliers, layout.offsets, *layout.primes)
            self._constants[layer, device] = tuple(torch.tensor(v, dtype=torch.int64, device=device) for v in values)
        return self._constants[layer, device]


def _flagged(tokens: Tensor, doc_start: Tensor | None, live: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, document starts and dead flags, all ``[B, T]`` on the tokens' device."""
    start = torch.zeros_like(tokens, dtype=torch.bool) if doc_start is None else doc_start.to(tokens.device)
    dead = torch.zeros_like(start) if live is None else ~live.to(tokens.device)
    return tokens, start, dead


def _in_context(history: Window | None, chunk: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The chunk behind what a history holds of the positions before it."""
    before = history.last() if history is not None else ()
    if not before:
        return chunk
    tokens, start, dead = (torch.cat(pair, dim=1) for pair in zip(before, chunk, strict=True))
    return tokens, start, dead


def _written_beyond(history: Window, chunk: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_in_context` for one position of sequences that go on, written where a history will hold it."""
    tokens, start, dead = history.beyond()
    for held, new in zip((tokens, start, dead), chunk, strict=True):
        held[:, -1:] = new
    return tokens, start, dead
