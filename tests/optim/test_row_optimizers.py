"""Row optimisers equal their written oracle, row by row in plain Python, and are ordinary torch optimisers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_engram.optim import ROW_OPTIMIZERS, RowAdagrad, RowAdam, RowOptimizer, RowSinkhorn, RowwiseAdam

Row = dict[str, list[float]]
Grads = list[list[float]]


def adam(rows: list[Row], grads: Grads, lr: float, betas: tuple[float, float], eps: float) -> None:
    """docs/spec.md in scalars, float64. Each rule is given the rows that a step touches, counted and decayed."""
    beta1, beta2 = betas
    for row, grad in zip(rows, grads, strict=True):
        c = row["count"][0]
        for i, g in enumerate(grad):
            row["mean"][i] = beta1 * row["mean"][i] + (1 - beta1) * g
            row["moment"][i] = beta2 * row["moment"][i] + (1 - beta2) * g * g
            m, v = row["mean"][i] / (1 - beta1**c), row["moment"][i] / (1 - beta2**c)
            row["value"][i] -= lr * m / (math.sqrt(v) + eps)


def rowwise_adam(rows: list[Row], grads: Grads, lr: float, beta2: float, eps: float) -> None:
    for row, grad in zip(rows, grads, strict=True):
        mean_square = sum(g * g for g in grad) / len(grad)
        row["moment"][0] = beta2 * row["moment"][0] + (1 - beta2) * mean_square
        v = row["moment"][0] / (1 - beta2 ** row["count"][0])
        for i, g in enumerate(grad):
            row["value"][i] -= lr * g / (math.sqrt(v) + eps)


def adagrad(rows: list[Row], grads: Grads, lr: float, eps: float) -> None:
    for row, grad in zip(rows, grads, strict=True):
        for i, g in enumerate(grad):
            row["squares"][i] += g * g
            row["value"][i] -= lr * g / (math.sqrt(row["squares"][i]) + eps)


def sinkhorn(rows: list[Row], grads: Grads, lr: float, beta: float, normalizations: int, threshold: float) -> None:
    """As the paper has it: the matrix itself is divided by its norms, in turns."""
    matrix = []
    for row, grad in zip(rows, grads, strict=True):
        row["momentum"] = [beta * m + (1 - beta) * g for m, g in zip(row["momentum"], grad, strict=True)]
        matrix.append([beta * m + (1 - beta) * g for m, g in zip(row["momentum"], grad, strict=True)])
    lengths = [math.hypot(*line) for line in matrix]
    matrix = [
        [0.0 for _ in line] if length <= threshold * sum(lengths) / len(lengths) else line
        for line, length in zip(matrix, lengths, strict=True)
    ]
    for number in range(normalizations):
        lines = matrix if number % 2 == 0 else list(map(list, zip(*matrix, strict=True)))
        lines = [[x / (math.hypot(*line) or 1.0) for x in line] for line in lines]
        matrix = lines if number % 2 == 0 else list(map(list, zip(*lines, strict=True)))
    for row, line in zip(rows, matrix, strict=True):
        row["value"] = [v - lr * 0.18 * len(line) ** 0.5 * u for v, u in zip(row["value"], line, strict=True)]


def step(optimizer: RowOptimizer, proxy: nn.Parameter, table: dict[str, Tensor], rows: Tensor, grad: Tensor) -> None:
    """What a bank does: bind the touched rows, step, write them back."""
    planes = {name: plane[rows] for name, plane in table.items()}
    proxy.data, proxy.grad = planes["value"], grad
    optimizer.state[proxy] = planes
    optimizer.step()
    for name, plane in planes.items():
        table[name][rows] = plane


def new_table(optimizer: RowOptimizer, rows: int, width: int) -> dict[str, Tensor]:
    types = {"int32": torch.int32, "fp32": torch.float32}
    planes = {p.name: torch.zeros(rows, p.width, dtype=types[p.codec]) for p in optimizer.planes(width)}
    return {"value": torch.randn(rows, width), "count": torch.zeros(rows, 1, dtype=torch.int32), **planes}


betas, eps = st.sampled_from([0.0, 0.5, 0.9, 0.999]), st.sampled_from([1e-8, 1e-3])
RULES: list[tuple[Callable[..., RowOptimizer], Callable[..., None], dict[str, st.SearchStrategy[Any]]]] = [
    (RowAdam, adam, {"betas": st.tuples(betas, betas), "eps": eps}),
    (RowwiseAdam, rowwise_adam, {"beta2": betas, "eps": eps}),
    (RowAdagrad, adagrad, {"eps": eps}),
    (
        RowSinkhorn,
        sinkhorn,
        {
            "beta": st.sampled_from([0.0, 0.5, 0.95]),
            "normalizations": st.sampled_from([1, 3, 11]),
            "threshold": st.sampled_from([1e-3, 0.9]),
        },
    ),
]


def test_every_rule_has_an_oracle() -> None:
    assert [kind for kind, _, _ in RULES] == list(ROW_OPTIMIZERS.values())


@pytest.mark.parametrize("kind, rule, settings", RULES)
@given(st.sampled_from([0.0, 2.0]), st.booleans(), st.integers(1, 5), st.data())
def test_equals_the_oracle_with_rows_at_different_counts(
    kind: Callable[..., RowOptimizer],
    rule: Callable[..., None],
    settings: dict[str, st.SearchStrategy[Any]],
    decay: float,
    lazy: bool,
    width: int,
    data: st.DataObject,
) -> None:
    """Rates change from step to step. On the way everything is saved, and another optimiser goes on with it."""
    proxy = nn.Parameter(torch.empty(0, width))
    chosen = {name: data.draw(strategy) for name, strategy in settings.items()}
    optimizer = kind([proxy], lr=0.0, weight_decay=decay, lazy_decay=lazy, **chosen)
    table = new_table(optimizer, 6, width)
    oracle = [{name: plane[r].double().tolist() for name, plane in table.items()} for r in range(6)]
    owed = [1.0] * 6
    touched = st.sets(st.integers(0, 5), max_size=6).map(sorted)
    for number, rows in enumerate(data.draw(st.lists(touched, max_size=12)), start=1):
        lr, scale = data.draw(st.sampled_from([0.0, 0.05, 0.2])), data.draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
        if data.draw(st.booleans()):
            saved, optimizer = optimizer.state_dict(), kind([proxy], lazy_decay=lazy)
            optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["lr"] = lr
        grad = torch.randn(len(rows), width) * scale
        step(optimizer, proxy, table, torch.tensor(rows, dtype=torch.int64), grad.clone())
        owed = [share * (1 - lr * decay) if lazy else 1 - lr * decay for share in owed]
        for row in rows:
            oracle[row]["count"][0] += 1
            oracle[row]["value"] = [owed[row] * v for v in oracle[row]["value"]]
            owed[row] = 1.0
            if lazy:
                oracle[row]["last"] = [number]
        rule([oracle[row] for row in rows], grad.double().tolist(), lr, **chosen)
    for name, plane in table.items():
        expected = torch.tensor([row[name] for row in oracle], dtype=torch.float64)
        assert torch.allclose(plane.double(), expected, rtol=3e-4, atol=1e-5), name


@pytest.mark.parametrize(
    "kind, dense",
    [
        (RowAdam, partial(torch.optim.Adam, lr=0.01)),
        (RowwiseAdam, partial(torch.optim.Adam, lr=0.01, betas=(0.0, 0.999))),
        (RowAdagrad, partial(torch.optim.Adagrad, lr=0.01)),
    ],
)
def test_a_row_touched_at_every_step_follows_torch(
    kind: Callable[..., RowOptimizer], dense: Callable[..., torch.optim.Optimizer]
) -> None:
    """One number a row makes row-wise Adam Adam with β1 = 0."""
    proxy, whole = nn.Parameter(torch.empty(0, 1)), nn.Parameter(torch.randn(3, 1))
    optimizer, reference = kind([proxy], 0.01), dense([whole])
    table = {**new_table(optimizer, 3, 1), "value": whole.detach().clone()}
    for _ in range(50):
        whole.grad = torch.randn(3, 1)
        step(optimizer, proxy, table, torch.arange(3), whole.grad.clone())
        reference.step()
    assert torch.allclose(table["value"], whole.detach(), atol=1e-6)


def test_adagrad_on_touched_rows_is_adagrad_on_the_table() -> None:
    proxy, whole = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.randn(9, 4))
    optimizer, reference = RowAdagrad([proxy], 0.1), torch.optim.Adagrad([whole], 0.1)
    table = {**new_table(optimizer, 9, 4), "value": whole.detach().clone()}
    for _ in range(30):
        rows = torch.randperm(9)[: int(torch.randint(9, ()))].sort().values
        grad, whole.grad = torch.randn(len(rows), 4), torch.zeros(9, 4)
        whole.grad[rows] = grad
        step(optimizer, proxy, table, rows, grad)
        reference.step()
    assert torch.allclose(table["value"], whole.detach(), atol=1e-6)


def test_lazy_decay_is_decay_of_the_whole_table_once_it_is_paid() -> None:
    """Without gradients Adagrad moves nothing, so that decay is all there is."""
    proxy = nn.Parameter(torch.empty(0, 3))
    optimizer = RowAdagrad([proxy], weight_decay=0.3, lazy_decay=True)
    table = new_table(optimizer, 50, 3)
    expected = table["value"].double()
    for number in range(400):
        rate = 0.02 + 0.01 * math.sin(number)
        optimizer.param_groups[0]["lr"] = rate
        rows = torch.randperm(50)[:5].sort().values if number < 399 else torch.arange(50)
        expected *= 1 - rate * 0.3
        step(optimizer, proxy, table, rows, torch.zeros(len(rows), 3))
    assert bool((table["last"] == 400).all())
    torch.testing.assert_close(table["value"].double(), expected, rtol=1e-5, atol=0.0)


def test_a_decay_that_leaves_nothing_is_refused_before_anything_changes() -> None:
    proxy = nn.Parameter(torch.empty(0, 2))
    optimizer = RowAdam([proxy], lr=0.5, weight_decay=2.0, lazy_decay=True)
    table = new_table(optimizer, 3, 2)
    before = {name: plane.clone() for name, plane in table.items()}
    with pytest.raises(ValueError, match=r"lr=0\.5 and weight_decay=2\.0 leaves nothing of a row: keep their product"):
        step(optimizer, proxy, table, torch.arange(3), torch.ones(3, 2))
    assert optimizer.owed_decay == [[0.0]]
    assert all(torch.equal(plane, before[name]) for name, plane in table.items())
    for kind in (RowAdam([proxy]), RowAdam([proxy], lazy_decay=True)):
        other = RowAdam([proxy], lazy_decay=not kind.lazy_decay)
        with pytest.raises(ValueError, match="another lazy_decay: build it as it was"):
            other.load_state_dict(kind.state_dict())
    with pytest.raises(ValueError, match="of 2 parameter groups, not 1: build the row optimiser as it was"):
        optimizer.load_owed_decay([[0.0], [0.0]])


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
    size = 0.18 if kind is RowSinkhorn else 1.0
    assert moved == pytest.approx([-size, -size / 2, -size / 4], rel=1e-5)
    state = optimizer.state_dict()
    assert state["state"] == {} and state["param_groups"][0]["lr"] == 0.125
    again = kind([proxy], lr=9.0)
    again.load_state_dict(state)
    assert again.param_groups[0]["lr"] == 0.125
    proxy.grad = None
    assert again.step(lambda: 7) == 7
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])


def test_an_even_number_of_normalizations_is_refused() -> None:
    for number in (0, 2, -1):
        with pytest.raises(ValueError, match=f"normalizations={number} would not end with rows: give an odd number"):
            RowSinkhorn([nn.Parameter(torch.empty(0, 2))], normalizations=number)


def test_balanced_updates_have_the_same_size_in_rows_and_columns() -> None:
    proxy = nn.Parameter(torch.empty(0, 16))
    optimizer = RowSinkhorn([proxy], lr=1.0)
    grad = torch.randn(300, 16) * torch.logspace(-2, 2, 16) * torch.logspace(-1, 1, 300)[:, None]
    table = {**new_table(optimizer, 300, 16), "value": torch.zeros(300, 16)}
    step(optimizer, proxy, table, torch.arange(300), grad)
    moved = table["value"] / 0.18
    torch.testing.assert_close(moved.square().mean(dim=1), torch.ones(300), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(moved.square().mean(dim=0), torch.ones(16), rtol=0.02, atol=0.0)
    assert bool((moved.sign() == -grad.sign()).all())


def in_shards(shards: list[Tensor], table: dict[str, Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """Steps of a table whose rows are divided over ranks: a thread each, sums added in the order of ranks."""
    ranks, barrier = len(shards), threading.Barrier(len(shards))
    given: list[Tensor] = [torch.empty(0)] * ranks
    failed: list[BaseException] = []

    def work(rank: int) -> None:
        def over_ranks(sums: Tensor) -> Tensor:
            given[rank] = sums
            barrier.wait()
            total = torch.stack(given).sum(dim=0)
            barrier.wait()
            return total

        try:
            proxy = nn.Parameter(torch.empty(0, grads[0].shape[1]))
            optimizer = RowSinkhorn([proxy], lr=0.1)
            optimizer.over_ranks = over_ranks
            for grad in grads:
                step(optimizer, proxy, table, shards[rank], grad[shards[rank]])
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    return table


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_balance_over_ranks_is_that_of_the_whole_table(rows: int, width: int, ranks: int, seed: int) -> None:
    """Also with ranks that have no row; and the bits repeat."""
    torch.manual_seed(seed)
    whole = new_table(RowSinkhorn([nn.Parameter(torch.empty(0, width))]), rows, width)
    grads = [torch.randn(rows, width) * 10.0 ** torch.randint(-2, 2, (rows, 1)) for _ in range(3)]
    owner = torch.randint(ranks, (rows,))
    shards = [(owner == rank).nonzero().squeeze(1) for rank in range(ranks)]
    copies = [{name: plane.clone() for name, plane in whole.items()} for _ in range(3)]
    one = in_shards([torch.arange(rows)], copies[0], grads)
    many, again = in_shards(shards, copies[1], grads), in_shards(shards, copies[2], grads)
    for name, plane in one.items():
        torch.testing.assert_close(many[name], plane, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(many[name], again[name])
