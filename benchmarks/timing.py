"""Times on a GPU: by its own events, after a warm-up, with work queued ahead so that launches do not show."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(work: Callable[[], Any], repeats: int = 30, warm_up: int = 5) -> list[float]:
    """What each of ``repeats`` calls took on the GPU."""
    for _ in range(warm_up):
        work()
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # some ten milliseconds, in which the first calls are queued
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def median(samples: list[float]) -> float:
    """The middle sample, or the mean of the two in the middle."""
    ordered, half = sorted(samples), len(samples) // 2
    return ordered[half] if len(samples) % 2 else (ordered[half - 1] + ordered[half]) / 2


def copy_rate() -> float:
    """Bytes a millisecond that a device-to-device copy moves, read and written both counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median(milliseconds(lambda: target.copy_(source)))
