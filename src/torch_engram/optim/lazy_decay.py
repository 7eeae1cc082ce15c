"""Weight decay that a row owes for the steps that did not touch it (docs/spec.md, row optimisers).

A step t multiplies every row by 1 - lr·λ. A row that it does not touch is multiplied when it is touched next: the row
remembers the step p of its last update, and what it has to pay is one difference of running sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class OwedDecay:
    """The decay of every step of one parameter group.

    ``sums[t]``: the sum of log(1 - lr·λ) over steps 1 to t, each with the rate that it had. A row whose last update was
    step p keeps exp(sums[t] - sums[p]) of itself at step t; p is 0 for one that was never updated.
    """

    def __init__(self, sums: Iterable[float] = (0.0,)):
        self.sums = list(sums)
        self._copy: Tensor | None = None  # float64, on the rows' device, with room for steps to come
        self._copied = 0

    def add(self, log_kept: float) -> None:
        """A step begins, at which rows keep exp(``log_kept``)."""
        self.sums.append(self.sums[-1] + log_kept)

    def settle(self, last: Tensor) -> Tensor:
        """What rows keep at this step, fp32 ``[U, 1]``. ``last``: int32 ``[U, 1]``, the steps of their last updates,
        which becomes this one."""
        step = len(self.sums) - 1
        sums = self._on(last.device)
        kept = (sums[step] - sums[last.long()]).exp().float()
        last.fill_(step)
        return kept

    def _on(self, device: torch.device) -> Tensor:
        """The sums on the rows' device. A new one is sent as a launch's argument, for which a GPU need not be waited
        for."""
        if self._copy is None or self._copy.device != device or len(self._copy) < len(self.sums):
            room = torch.zeros(2 * len(self.sums), dtype=torch.float64)
            room[: len(self.sums)] = torch.tensor(self.sums, dtype=torch.float64)
            self._copy, self._copied = room.to(device), len(self.sums)
        for step in range(self._copied, len(self.sums)):
            self._copy[step] = self.sums[step]
        self._copied = len(self.sums)
        return self._copy


def log_kept(group: dict[str, Any]) -> float:
    """log(1 - lr·λ) of a step with the settings of ``group``. Raises ``ValueError`` where nothing of a row would be
    left."""
    taken = float(group["lr"]) * group["weight_decay"]
    if not taken < 1:
        raise ValueError(
            f"lazy_decay with lr={float(group['lr'])} and weight_decay={group['weight_decay']} leaves nothing of a "
            "row: keep their product below 1."
        )
    return math.log1p(-taken)
