"""The one-pass row updates against update and encode: through the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_engram.optim import ROW_OPTIMIZERS, RowAdagrad, RowAdam, RowOptimizer, RowSinkhorn, RowwiseAdam
from torch_engram.stores import DecodedRows, Plane, RecordLayout, RowFormat, make_keys

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Make = Callable[..., RowOptimizer]


pytestmark = pytest.mark.usefixtures("in_place")


def table(optimizer: RowOptimizer, width: int, codec: str) -> RowFormat:
    planes = Plane("value", width, codec), Plane("count", 1, "int32"), *optimizer.planes(width)
    return RowFormat(RecordLayout(planes), seed=9, init_std=0.3)


def fields_only(layout: RecordLayout) -> Tensor:
    """Which bytes of a record belong to a field."""
    inside = torch.zeros(layout.nbytes, dtype=torch.bool, device=DEVICE)
    for field in layout.fields:
        inside[field.start : field.stop] = True
    return inside


def bound_step(optimizer: RowOptimizer, rows: dict[str, Tensor], grad: Tensor) -> None:
    """What a bank does."""
    (proxy,) = optimizer.param_groups[0]["params"]
    proxy.data, proxy.grad = rows["value"], grad
    optimizer.state[proxy] = rows
    optimizer.step()


def settings_of(kind: Make, beta: float) -> dict[str, Any]:
    return {
        RowAdam: {"betas": (beta, 0.99), "eps": 1e-6},
        RowwiseAdam: {"beta2": beta, "eps": 1e-6},
        RowAdagrad: {"eps": 1e-6},
        RowSinkhorn: {"beta": beta, "normalizations": 5, "threshold": 0.5},
    }[kind]


@settings(max_examples=6)
@given(st.integers(0, 40), st.integers(1, 70), st.sampled_from([0.0, 0.9]), st.sampled_from([1e-3, 30.0]))
@example(rows=3, width=1500, beta=0.9, size=1.0)
@example(rows=33, width=64, beta=0.999, size=1.0)
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ROW_OPTIMIZERS.values())
def test_several_steps_follow_the_twin(kind: Make, codec: str, rows: int, width: int, beta: float, size: float) -> None:
    """The twin is the same optimiser on planes that are copies."""
    rate = torch.tensor(0.05) if rows % 3 else 0.05  # schedulers and captured loops make tensors of it
    optimizer, twins = (
        kind(
            [nn.Parameter(torch.empty(0, width, device=DEVICE))],
            lr=rate, weight_decay=2.0 * (rows % 2), lazy_decay=rows % 4 == 1, **settings_of(kind, beta),
        )
        for _ in range(2)
    )  # fmt: skip
    row_format = table(optimizer, width, codec)
    layout, keys = row_format.layout, make_keys(3, torch.arange(rows, device=DEVICE) * 5)
    inside = fields_only(layout)
    records = torch.full((rows, layout.nbytes), 0xA5, dtype=torch.uint8, device=DEVICE)
    records[:, inside] = 0  # padding stays poisoned; rows have count 0
    for number in range(3):
        mine = DecodedRows(row_format, keys, records)
        twin = row_format.decode(keys, records.clone())
        grad = torch.randn(rows, width, device=DEVICE) * size
        bound_step(optimizer, mine, grad)
        assert mine.encoded and mine.encode() is records
        bound_step(twins, twin, grad)
        found = row_format.decode(keys, records)
        assert bool((found["count"] == number + 1).all()) and bool((records[:, ~inside] == 0xA5).all())
        assert "last" not in found or bool((found["last"] == number + 1).all())
        for name in twin.keys() - {"value", "count"}:
            torch.testing.assert_close(found[name], twin[name], rtol=1e-6, atol=1e-7 * max(size, size**2), msg=name)
        if codec == "fp32":
            torch.testing.assert_close(found["value"], twin["value"], rtol=1e-5, atol=1e-6)
        else:  # a last place of fp32 may tip a rounding over, seldom
            same = found["value"] == row_format.decode(keys, row_format.encode(keys, twin))["value"]
            assert (~same).sum() <= 1 + 0.002 * same.numel()
            torch.testing.assert_close(found["value"], twin["value"], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("kind", ROW_OPTIMIZERS.values())
def test_equal_numbers_round_to_equal_bits(kind: Make) -> None:
    proxy = nn.Parameter(torch.empty(0, 37, device=DEVICE))
    optimizer = kind([proxy], lr=0.0)
    row_format, keys = table(optimizer, 37, "bf16"), make_keys(3, torch.arange(50, device=DEVICE))
    rows = DecodedRows(row_format, keys, row_format.layout.empty(50, DEVICE))
    rows["count"].copy_(torch.arange(50, device=DEVICE)[:, None])
    rows["value"].normal_()
    expected = {name: plane.clone() for name, plane in rows.items()}
    expected["count"] += 1
    bound_step(optimizer, rows, torch.zeros(50, 37, device=DEVICE))
    found, wanted = (row_format.decode(keys, r)["value"] for r in (rows.encode(), row_format.encode(keys, expected)))
    assert torch.equal(found, wanted) and not torch.equal(found, expected["value"].bfloat16().float())


@pytest.mark.parametrize("kind", ROW_OPTIMIZERS.values())
def test_corrections_of_old_and_young_rows(kind: Make) -> None:
    proxy = nn.Parameter(torch.empty(0, 1, device=DEVICE))
    optimizer = kind([proxy], lr=1.0)
    row_format = table(optimizer, 1, "fp32")
    counts = torch.tensor([0, 1, 2, 9, 99, 1000, 10**5, 2**30], device=DEVICE).int()
    keys = make_keys(0, torch.arange(len(counts), device=DEVICE))
    rows = DecodedRows(row_format, keys, row_format.layout.empty(len(counts), DEVICE))
    rows["count"].copy_(counts[:, None])
    twin = {name: plane.clone() for name, plane in rows.items()}
    grad = torch.ones(len(counts), 1, device=DEVICE)
    bound_step(optimizer, rows, grad)
    bound_step(optimizer, twin, grad)
    torch.testing.assert_close(rows["value"], twin["value"], rtol=1e-5, atol=0.0)


def test_a_second_step_is_refused_and_others_take_the_long_way() -> None:
    class Plain(RowwiseAdam):
        def update(self, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
            super().update(rows, grad, state, group)

    results = []
    for kind in (RowwiseAdam, Plain):
        optimizer = kind([nn.Parameter(torch.empty(0, 6, device=DEVICE))], lr=0.1)
        row_format, keys = table(optimizer, 6, "bf16"), make_keys(3, torch.arange(7, device=DEVICE))
        rows = DecodedRows(row_format, keys, row_format.layout.empty(7, DEVICE))
        bound_step(optimizer, rows, torch.ones(7, 6, device=DEVICE))
        results.append(row_format.decode(keys, rows.encode()))
        assert rows.encoded == (kind is RowwiseAdam)
        if rows.encoded:
            with pytest.raises(ValueError, match=r"have taken their step: apply\(\) takes it"):
                optimizer.step()
    torch.testing.assert_close(results[0]["value"], results[1]["value"], rtol=2**-7, atol=1e-6)
    assert torch.equal(results[0]["count"], results[1]["count"])
