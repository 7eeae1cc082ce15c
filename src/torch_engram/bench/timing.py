"""Times and rates: on a GPU by its events, with work queued ahead so that launches do not show; else by the clock."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Shape = tuple[int, int, int, int]
"""A batch of b matrix products ``[m, k] @ [k, n]``: (b, m, k, n)."""


def milliseconds(
    work: Callable[[], Any], repeats: int = 30, warm_up: int = 5, device: torch.device | str = "cuda"
) -> list[float]:
    """What each of ``repeats`` calls took on ``device``."""
    for _ in range(warm_up):
        work()
    if torch.device(device).type == "cpu":
        ends = [time.perf_counter()]
        for _ in range(repeats):
            work()
            ends.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(ends)]
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # some ten milliseconds, in which the first calls are queued
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def wall_milliseconds(work: Callable[[], Any], times: int, device: torch.device | str = "cuda") -> float:
    """Mean wall time of a call, the device waited for before the first and after the last."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return 1e3 * (time.perf_counter() - start) / times


def in_turns(takes: Mapping[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """What each of ``takes`` returned, one sample a turn: what is compared takes turns, there and back, so that what
    changes meanwhile, such as a clock rate, changes for all."""
    samples: dict[str, list[float]] = {name: [] for name in takes}
    for turn in range(turns):
        for name in list(takes)[:: -1 if turn % 2 else 1]:
            samples[name].append(takes[name]())
    return samples


def median(samples: list[float]) -> float:
    """The middle sample, or the mean of the two in the middle."""
    ordered, half = sorted(samples), len(samples) // 2
    return ordered[half] if len(samples) % 2 else (ordered[half - 1] + ordered[half]) / 2


def copy_rate(device: torch.device | str = "cuda") -> float:
    """Bytes a millisecond that a copy on ``device`` moves, read and written both counted."""
    size = 1 << 30 if torch.device(device).type == "cuda" else 1 << 27
    source = torch.zeros(size, dtype=torch.uint8, device=device)  # written once: a CPU maps empty pages lazily
    target = torch.zeros_like(source)
    return 2 * size / median(milliseconds(lambda: target.copy_(source), repeats=15, device=device))


def product_milliseconds(
    shape: Shape, dtype: torch.dtype, device: torch.device | str = "cuda", repeats: int = 15
) -> list[float]:
    """Milliseconds of these matrix products by ``torch.mm``, or ``torch.bmm`` for more than one."""
    b, m, k, n = shape
    left, right = (torch.randn(size, device=device).to(dtype) for size in ((b, m, k), (b, k, n)))
    out = torch.empty(b, m, n, device=device, dtype=dtype)
    if b > 1:
        return milliseconds(lambda: torch.bmm(left, right, out=out), repeats, 3, device)
    return milliseconds(lambda: torch.mm(left[0], right[0], out=out[0]), repeats, 3, device)


def product_rate(dtype: torch.dtype, device: torch.device | str = "cuda") -> float:
    """Operations a millisecond, a multiply-add being two, of one large matrix product."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    return 2 * size**3 / median(product_milliseconds((1, size, size, size), dtype, device))
