"""Writes that return at once: one thread carries them out in their order, and each is acknowledged when it is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

_MOST_PENDING = 4
"""Writes under way; a further one waits for the oldest, so that what is held in memory stays bounded."""


class OrderedWrites:
    """The writes of one store. ``begin``: takes keys and records, and returns what carries them out, on another thread.
    ``where``: that they go to, for messages."""

    def __init__(self, begin: Callable[[Tensor, Tensor], Callable[[], None]], where: str):
        self._begin, self._where = begin, where
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
        carry_out = self._begin(keys, records)
        while len(self._pending) >= _MOST_PENDING:
            self._pending.popleft().result()
        self._epoch += 1
        self._pending.append(self._writer.submit(self._carry_out, self._epoch, carry_out))
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

    def _carry_out(self, epoch: int, carry_out: Callable[[], None]) -> None:
        if epoch != self.acknowledged + 1:
            raise RuntimeError(f"write {epoch} is left out, because write {self.acknowledged + 1} failed")
        try:
            carry_out()
        except BaseException:
            self._failed = True
            raise
        self.acknowledged = epoch


def staged(scatter: Callable[[Tensor, Tensor], None], keys: Tensor, records: Tensor) -> Callable[[], None]:
    """What calls ``scatter`` with the tensors in host memory, where a GPU's are copied to from now on."""
    if keys.device.type == "cpu":
        return partial(scatter, keys, records)
    on_host = [
        torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in (keys, records)
    ]
    ready = torch.cuda.current_stream(keys.device).record_event()

    def carry_out() -> None:
        ready.synchronize()
        scatter(*on_host)

    return carry_out
