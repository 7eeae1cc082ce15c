"""Ops are right or not timed, are found by name, and are measured against something positive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.bench import OPS
from torch_engram.bench.memory_ops import natural_ids
from torch_engram.bench.ops import Op, Sizes, Stand, choose_ops, error, require_right, with_sizes
from torch_engram.bench.results import quantiles
from torch_engram.bench.timing import in_turns, median, milliseconds, product_milliseconds, wall_milliseconds
from torch_engram.memory import segments

SIZES = Sizes("cpu", torch.float32, tokens=64, hidden=128, branches=2, rows=300, vocab=80, experts=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_every_op_is_right_and_runs_in_both_forms(name: str, dtype: torch.dtype, device: torch.device) -> None:
    made = OPS[name](replace(SIZES, dtype=dtype, device=device.type))
    require_right(name, made)
    made.ours()
    made.naive(lambda function: function)()
    assert made.moved > 0
    assert all(len(shape) == 4 and min(shape) > 0 for shape in made.products)
    require_right(name, made)  # what is timed may change its inputs, and stays right


@pytest.mark.parametrize("name", OPS)
def test_every_op_says_what_its_limit_counts(name: str) -> None:
    assert "Moved:" in (OPS[name].__doc__ or "")


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = segments.merge

    def wrong(*arguments: torch.Tensor) -> torch.Tensor:
        merged = right(*arguments)
        merged[5] += 1.0
        return merged

    monkeypatch.setattr(segments, "merge", wrong)
    timed: list[object] = []
    monkeypatch.setattr("torch_engram.bench.ops.milliseconds", lambda *_, **__: timed.append(1) or [1.0])
    stand = Stand(SIZES, repeats=1)
    with pytest.raises(ValueError, match=r"merge is wrong on this device: result 0 is off by .* not timed"):
        stand.time("merge")
    assert not timed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    results = [(torch.full((3,), value), torch.ones(3))]
    made = Op(lambda: None, lambda wrap: lambda: None, lambda: results, moved=1.0)
    with pytest.raises(ValueError, match="wrong on this device"):
        require_right("broken", made)


def test_errors_of_results() -> None:
    ones = torch.ones(4)
    assert error(ones, ones) == 0.0
    assert error(1.1 * ones, ones) == pytest.approx(0.1, rel=1e-5)
    assert error(ones[:3], ones) == float("inf")
    whole = torch.arange(4)
    assert error(whole.int(), whole) == 0.0
    assert error(whole + 1, whole) == float("inf")


def test_names_of_ops() -> None:
    assert choose_ops([]) == list(OPS)
    assert choose_ops(["merge", "addressing"]) == ["addressing", "merge"]
    with pytest.raises(ValueError, match="There is no op 'adressing': did you mean 'addressing'"):
        choose_ops(["adressing"])
    with pytest.raises(ValueError, match="named 'compil': did you mean 'compile'"):
        Stand(SIZES, "compil")


def test_the_compiler_takes_the_twin_and_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    stand = Stand(SIZES, "compile", repeats=2)
    timed = stand.time("fusion")
    assert len(compiled) == 1 and timed.against is not None
    assert timed.speed_up == median(timed.against) / median(timed.ours)
    assert [one.case for one in timed.measurements("compile")] == ["ours", "compile", "compile-over-ours"]

    def refuse(function: object, **_: object) -> None:
        raise torch._dynamo.exc.Unsupported("no such thing")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(UserWarning, match="cannot compile the plain form of merge: no such thing"):
        timed = stand.time("merge")
    assert timed.against is None and [one.case for one in timed.measurements("compile")] == ["ours"]


def test_sizes() -> None:
    assert with_sizes("cpu", None) == with_sizes("cpu", "fp32", tokens=None)
    assert with_sizes("cuda", "fp32", tokens=128).tokens == 128
    with pytest.raises(ValueError, match="hidden is 100: make it a multiple of 128"):
        with_sizes("cpu", None, hidden=100)
    with pytest.raises(ValueError, match="no dtype 'bf61': did you mean 'bf16'"):
        with_sizes("cpu", "bf61")
    with pytest.raises(ValueError, match="no device 'gpu'"):
        with_sizes("gpu", None)


def test_natural_ids_are_in_the_table_and_uneven() -> None:
    ids = natural_ids(20_000, 5000, "cpu")
    assert int(ids.min()) >= 0 and int(ids.max()) < 5000
    assert int(ids.bincount().max()) > 20_000 / 60


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_quantiles_are_ordered_and_inside(samples: list[float]) -> None:
    p20, p50, p80 = quantiles(samples)
    slack = 1e-9 * max(map(abs, samples))
    assert min(samples) - slack <= p20 <= p50 + slack and p50 <= p80 + slack and p80 <= max(samples) + slack
    assert p50 == pytest.approx(median(samples), abs=slack)
    assert quantiles(samples[::-1]) == (p20, p50, p80)


def test_timing_calls_as_often_as_it_says() -> None:
    calls: list[int] = []
    assert len(milliseconds(lambda: calls.append(1), 4, 3, "cpu")) == 4 and len(calls) == 7
    assert wall_milliseconds(lambda: calls.append(1), 5, "cpu") > 0 and len(calls) == 12
    assert len(product_milliseconds((2, 3, 4, 5), torch.float32, "cpu", repeats=2)) == 2
    order: list[str] = []
    takes = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    assert in_turns(takes, 3) == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert "".join(order) == "abbaab"
