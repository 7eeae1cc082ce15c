"""Row optimisers equal their written oracle, row by row in plain Python, and are ordinary torch optimisers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_engram.optim import ROW_OPTIMIZERS, RowAdam, RowOptimizer, RowwiseAdam

Row = dict[str, list[float]]


def adam(row: Row, grad: list[float], lr: float, beta1: float, beta2: float, eps: float, decay: float) -> None:
    """SPEC section 4, one row, float64, and decoupled weight decay."""
    row["count"][0] += 1
    c = row["count"][0]
    for i, g in enumerate(grad):
        row["mean"][i] = beta1 * row["mean"][i] + (1 - beta1) * g
        row["moment"][i] = beta2 * row["moment"][i] + (1 - beta2) * g * g
        m, v = row["mean"][i] / (1 - beta1**c), row["moment"][i] / (1 - beta2**c)
        row["value"][i] = (1 - lr * decay) * row["value"][i] - lr * m / (math.sqrt(v) + eps)


def rowwise_adam(row: Row, grad: list[float], lr: float, beta2: float, eps: float, decay: float) -> None:
    row["count"][0] += 1
    mean_square = sum(g * g for g in grad) / len(grad)
    row["moment"][0] = beta2 * row["moment"][0] + (1 - beta2) * mean_square
    v = row["moment"][0] / (1 - beta2 ** row["count"][0])
    for i, g in enumerate(grad):
        row["value"][i] = (1 - lr * decay) * row["value"][i] - lr * g / (math.sqrt(v) + eps)


def step(optimizer: RowOptimizer, proxy: nn.Parameter, table: dict[str, Tensor], rows: Tensor, grad: Tensor) -> None:
    """What a bank does: bind the touched rows, step, write them back."""
    planes = {name: plane[rows] for name, plane in table.items()}
    proxy.data, proxy.grad = planes["value"], grad
    optimizer.state[proxy] = planes
    optimizer.step()
    for name, plane in planes.items():
        table[name][rows] = plane


def new_table(optimizer: RowOptimizer, rows: int, width: int) -> dict[str, Tensor]:
    planes = {plane.name: torch.zeros(rows, plane.width) for plane in optimizer.planes(width)}
    return {"value": torch.randn(rows, width), "count": torch.zeros(rows, 1, dtype=torch.int32), **planes}


betas = st.sampled_from([0.0, 0.5, 0.9, 0.999])


@given(
    st.booleans(),
    betas,
    betas,
    st.sampled_from([1e-8, 1e-3]),
    st.sampled_from([0.0, 2.0]),
    st.integers(1, 5),
    st.data(),
)
def test_equals_the_oracle_with_rows_at_different_counts(
    full: bool, beta1: float, beta2: float, eps: float, decay: float, width: int, data: st.DataObject
) -> None:
    proxy = nn.Parameter(torch.empty(0, width))
    optimizer = (
        RowAdam([proxy], 0.05, (beta1, beta2), eps, decay) if full else RowwiseAdam([proxy], 0.05, beta2, eps, decay)
    )
    table = new_table(optimizer, 6, width)
    oracle = [{name: plane[r].double().tolist() for name, plane in table.items()} for r in range(6)]
    touched = st.sets(st.integers(0, 5), max_size=6).map(sorted)
    for rows in data.draw(st.lists(touched, max_size=12)):
        scale = data.draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
        grad = torch.randn(len(rows), width) * scale
        step(optimizer, proxy, table, torch.tensor(rows, dtype=torch.int64), grad.clone())
        for row, g in zip(rows, grad.double().tolist(), strict=True):
            if full:
                adam(oracle[row], g, 0.05, beta1, beta2, eps, decay)
            else:
                rowwise_adam(oracle[row], g, 0.05, beta2, eps, decay)
    for name, plane in table.items():
        expected = torch.tensor([row[name] for row in oracle], dtype=torch.float64)
        assert torch.allclose(plane.double(), expected, rtol=3e-4, atol=1e-5), name


@pytest.mark.parametrize("kind", ROW_OPTIMIZERS.values())
def test_a_row_touched_at_every_step_follows_torch_adam(kind: Callable[..., RowOptimizer]) -> None:
    """One number a row makes both of them Adam, at β1 = 0 in the row-wise one."""
    proxy, dense = nn.Parameter(torch.empty(0, 1)), nn.Parameter(torch.randn(3, 1))
    optimizer = RowAdam([proxy], 0.01) if kind is RowAdam else RowwiseAdam([proxy], 0.01)
    reference = torch.optim.Adam([dense], 0.01, betas=(0.9 if kind is RowAdam else 0.0, 0.999))
    table = {**new_table(optimizer, 3, 1), "value": dense.detach().clone()}
    for _ in range(50):
        dense.grad = torch.randn(3, 1)
        step(optimizer, proxy, table, torch.arange(3), dense.grad.clone())
        reference.step()
    assert torch.allclose(table["value"], dense.detach(), atol=1e-6)


@pytest.mark.parametrize("kind", ROW_OPTIMIZERS.values())
def test_is_an_ordinary_optimizer(kind: Callable[..., RowOptimizer]) -> None:
    proxy = nn.Parameter(torch.empty(0, 2))
    optimizer = kind([proxy], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    moved = []
    for _ in range(3):
        table = {**new_table(optimizer, 2, 2), "value": torch.zeros(2, 2)}
        step(optimizer, proxy, table, torch.arange(2), torch.ones(2, 2))
        moved.append(float(table["value"].mean()))
        scheduler.step()
    assert moved == pytest.approx([-1.0, -0.5, -0.25], rel=1e-5)
    state = optimizer.state_dict()
    assert state["state"] == {} and state["param_groups"][0]["lr"] == 0.125
    again = kind([proxy], lr=9.0)
    again.load_state_dict(state)
    assert again.param_groups[0]["lr"] == 0.125
    proxy.grad = None
    assert again.step(lambda: 7) == 7
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])
