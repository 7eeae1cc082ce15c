"""Writes that return at once: one thread carries them out in their order, and each is acknowledged when it is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_MOST_PENDING = 4
"""Writes under way; a further one waits for the oldest, so that what is held in memory stays bounded."""


class OrderedWrites:
    """The writes of one store. ``carry_out``: replaces records of keys, both in host memory. ``where``: that they go
    to, for messages."""

    def __init__(self, carry_out: Callable[[Tensor, Tensor], None], where: str):
        self._scatter, self._where = carry_out, where
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engram-writes")
        self._pending: deque[Future[None]] = deque()
        self._epoch = 0
        self._failed = False
        self.acknowledged = 0
        """Every write up to this epoch is carried out."""

    def write(self, keys: Tensor, records: Tensor) -> int:
        """Take a write on, from any device; returns its epoch. Raises what an earlier one raised, or ``RuntimeError``
        after that."""
        if self._failed:
            self.flush()
        on_host, ready = _stage(keys, records)
        while len(self._pending) >= _MOST_PENDING:
            self._pending.popleft().result()
        self._epoch += 1
        self._pending.append(self._writer.submit(self._carry_out, self._epoch, *on_host, ready))
        return self._epoch

    def flush(self) -> None:
        """Return when every write is acknowledged. Raises what a failed write raised, and from then on
        ``RuntimeError``: the rows are no longer those that were written."""
        while self._pending:
            self._pending.popleft().result()
        if self.acknowledged != self._epoch:
            raise RuntimeError(
                f"write {self.acknowledged + 1} to {self._where} failed, and those after it were left out"
            )

    def _carry_out(self, epoch: int, keys: Tensor, records: Tensor, ready: torch.cuda.Event | None) -> None:
        if epoch != self.acknowledged + 1:
            raise RuntimeError(f"write {epoch} is left out, because write {self.acknowledged + 1} failed")
        try:
            if ready is not None:
                ready.synchronize()
            self._scatter(keys, records)
        except BaseException:
            self._failed = True
            raise
        self.acknowledged = epoch


def _stage(keys: Tensor, records: Tensor) -> tuple[tuple[Tensor, Tensor], torch.cuda.Event | None]:
    """The write's tensors in host memory, and the event after which they are there."""
    if keys.device.type == "cpu":
        return (keys, records), None
    staged = tuple(
        torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in (keys, records)
    )
    return (staged[0], staged[1]), torch.cuda.current_stream(keys.device).record_event()
