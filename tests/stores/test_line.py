"""Reads in line: whatever threads do, they begin in an order, are placed in the same one, and leave when they fail."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_engram.stores.line import UNDER_WAY, Line


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["read", "alone", "fails", "left"]), min_size=1, max_size=12), st.integers(0, 99))
def test_reads_of_many_threads_begin_and_end_in_one_order(kinds: list[str], seed: int) -> None:
    line, seen = Line(torch.device("cpu")), list[tuple[str, int]]()
    pauses = torch.rand(len(kinds), generator=torch.Generator().manual_seed(seed)).mul(1e-3).tolist()

    def read(kind: str, pause: float) -> None:
        if kind == "alone":
            with line.alone():
                seen.append(("alone", -1))
            return
        try:
            with line.join() as number:
                seen.append(("begun", number))
                assert len([each for each, _ in seen if each == "begun"]) - ended() <= UNDER_WAY
                if kind == "fails":
                    raise OSError("no")
        except OSError:
            return
        time.sleep(pause)
        if kind == "left":
            line.leave(number)
            return
        with line.head(number):
            seen.append(("placed", number))

    def ended() -> int:
        return line._finished

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(read, *each) for each in zip(kinds, pauses, strict=True)]:
            done.result(timeout=20)
    for what in ("begun", "placed"):
        numbers = [number for each, number in seen if each == what]
        assert numbers == sorted(numbers)
    assert line.issued == line._finished == line._begun == len(kinds)


def test_a_read_alone_waits_for_those_before_it() -> None:
    line, order = Line(torch.device("cpu")), list[str]()
    with line.join() as first:
        pass

    def whole() -> None:
        with line.alone():
            order.append("alone")

    thread = threading.Thread(target=whole)
    thread.start()
    time.sleep(0.05)
    with line.head(first):
        order.append("first")
    thread.join(10)
    assert order == ["first", "alone"]
    with pytest.raises(OSError), line.join():
        raise OSError("no")
    with line.alone():
        order.append("again")
    assert order[-1] == "again"
