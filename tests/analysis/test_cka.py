"""Centred kernel alignment: its estimator against the definition, what it must not see, and layers of two models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies
from torch import Tensor

from torch_engram.analysis.cka import cka, cka_matrix, grams, hsic, hsic_naive, soft_alignment
from torch_engram.analysis.reading import Reading
from torch_engram.analysis.subject import Subject, open_subject
from torch_engram.data import Batch
from torch_engram.train import Trainer


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def readings(count: int = 2, vocab: int = 300) -> list[Reading]:
    tokens = torch.randint(3, vocab, (count, 3, 16), generator=torch.Generator().manual_seed(4))
    starts = torch.zeros(3, 16, dtype=torch.bool)
    starts[:, 0] = True
    return [Reading(Batch(each, each, starts), torch.ones(3, 16, dtype=torch.bool)) for each in tokens]


# -- the estimator ----------------------------------------------------------------------------------------------------


@given(n=strategies.integers(4, 7), seed=strategies.integers(0, 1000))
def test_hsic_is_its_definition(n: int, seed: int) -> None:
    """Also of the states as they are: that they are centred first changes nothing."""
    x, y = drawn(seed, n, 3).double() + 2, drawn(seed + 1, n, 5).double() - 1
    found = hsic(grams(x[None]), grams(y[None]))
    assert float(found) == pytest.approx(hsic_naive(x @ x.T, y @ y.T), rel=1e-9, abs=1e-9)


def test_hsic_of_every_pair() -> None:
    k, l = grams(drawn(0, 2, 6, 3)), grams(drawn(1, 3, 6, 4))  # noqa: E741
    expected = [[hsic_naive(one, other) for other in l] for one in k]
    torch.testing.assert_close(hsic(k, l), torch.tensor(expected, dtype=torch.float64))


def test_hsic_is_unbiased() -> None:
    """Of unrelated states it is 0 in the mean, where the biased one, tr(KHLH) / (n - 1)^2, is far above 0."""
    n, unbiased, biased = 8, [], []
    for seed in range(0, 2000, 2):
        x, y = drawn(seed, n, 4).double(), drawn(seed + 1, n, 4).double()
        unbiased.append(float(hsic(grams(x[None]), grams(y[None]))))
        x, y = x - x.mean(0), y - y.mean(0)
        biased.append(float((x @ x.T * (y @ y.T)).sum()) / (n - 1) ** 2)
    found = torch.tensor(unbiased)
    error = found.std() / len(found) ** 0.5
    assert found.mean().abs() < 3 * error and (found < 0).any()
    assert torch.tensor(biased).mean() > 20 * error


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    x, y = drawn(0, 64, 8), drawn(1, 64, 8)
    y = y + x
    far = torch.full((8,), 4096.0)  # which fp32 adds without rounding much of x away
    assert cka(x.double() + far, y.double() - far) == pytest.approx(cka(x, y), rel=1e-6)


# -- what CKA is ------------------------------------------------------------------------------------------------------


@given(n=strategies.integers(8, 40), d=strategies.integers(1, 6), seed=strategies.integers(0, 1000))
def test_cka_of_states_with_themselves_is_one(n: int, d: int, seed: int) -> None:
    x = drawn(seed, n, d)
    assert cka(x, x) == pytest.approx(1, rel=1e-9)


@given(scale=strategies.floats(0.01, 100), seed=strategies.integers(0, 1000))
def test_cka_sees_no_rotation_no_scale_no_shift(scale: float, seed: int) -> None:
    x, y = drawn(seed, 30, 6).double(), drawn(seed + 1, 30, 4).double()
    y[:, :3] += x[:, :3]
    turn, _ = torch.linalg.qr(drawn(seed + 2, 6, 6).double())
    assert cka(scale * x @ turn + 3, y) == pytest.approx(cka(x, y), rel=1e-6, abs=1e-9)
    assert cka(x, y) == pytest.approx(cka(y, x))


def test_cka_sees_other_maps() -> None:
    x = drawn(0, 200, 6)
    assert cka(x, x * torch.tensor([9.0, 1, 1, 1, 1, 1])) < 0.9


def test_unrelated_states_are_around_zero() -> None:
    found = torch.tensor([cka(drawn(2 * seed, 24, 16), drawn(2 * seed + 1, 24, 16)) for seed in range(200)])
    assert found.mean().abs() < 3 * found.std() / 200**0.5 and (found < 0).any()


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="these are 5 and 6"):
        cka(drawn(0, 5, 2), drawn(0, 6, 2))
    with pytest.raises(ValueError, match="CKA needs 4 tokens, and there are 3"):
        cka(drawn(0, 3, 2), drawn(0, 3, 2))
    with pytest.raises(ValueError, match="State 0 of a model is the same"):
        cka(torch.ones(9, 2), drawn(0, 9, 2))


# -- layers of models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(checkpoint: Path, dense: Trainer) -> tuple[Subject, Subject]:
    return open_subject(checkpoint), open_subject(dense.folder)


def states_at(subject: Subject, text: list[Reading]) -> Tensor:
    return torch.cat([subject.states(each.batch)[:, each.chosen] for each in text], dim=1)


def test_a_matrix_is_the_cka_of_every_pair(both: tuple[Subject, Subject]) -> None:
    """In one minibatch; what its order is does not matter."""
    text = readings()
    found = cka_matrix(*both, text, minibatch=96)
    a, b = (states_at(subject, text) for subject in both)
    expected = [[cka(x, y) for y in b] for x in a]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert len({round(value, 6) for row in expected for value in row}) == 9


def test_a_model_with_itself(both: tuple[Subject, Subject]) -> None:
    found = cka_matrix(both[0], both[0], readings(), minibatch=32)
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found, found.T)
    assert (found - torch.eye(3)).max() < 0.999


def test_minibatches_are_averaged_before_the_quotient(both: tuple[Subject, Subject]) -> None:
    """Minibatches as long as a text are known without their order: those of two texts together."""
    text = readings()
    found = cka_matrix(*both, text, minibatch=48)
    parts = [[grams(states_at(subject, [each])) for subject in both] for each in text]
    cross = sum(hsic(*part) for part in parts)
    own = [sum(hsic(part[side], part[side]).diagonal() for part in parts) for side in (0, 1)]
    torch.testing.assert_close(found, cross / torch.outer(*own).sqrt())
    short = readings(3)[2]
    short.chosen[1:] = False
    torch.testing.assert_close(cka_matrix(*both, [*text, short], minibatch=48), found)  # its rest is left out


def test_only_chosen_positions_are_compared(both: tuple[Subject, Subject]) -> None:
    text = readings()
    chosen = torch.zeros(3, 16, dtype=torch.bool)
    chosen[:, 3:9] = True
    few = [dataclasses.replace(each, chosen=chosen) for each in text]
    a, b = (states_at(subject, few) for subject in both)
    assert a.shape[1] == 36
    found = cka_matrix(*both, few)
    assert float(found[2, 1]) == pytest.approx(cka(a[2], b[1]))
    assert not torch.allclose(found, cka_matrix(*both, text))
    chosen.zero_()[0, :1] = True
    with pytest.raises(ValueError, match="CKA needs 4 tokens, and there are 2"):
        cka_matrix(*both, few)


# -- alignment --------------------------------------------------------------------------------------------------------


def test_the_alignment_by_hand() -> None:
    """The two most alike of four, weighed; the rest, and what is below 0, do not count."""
    similarity = torch.tensor([[0.1, 0.6, 0.2, 0.05], [-0.5, 0.0, 0.3, -0.1]])
    found = soft_alignment(similarity, k=2)
    torch.testing.assert_close(found, torch.tensor([(0.6 * 1 + 0.2 * 2) / 0.8, 2.0]))
    torch.testing.assert_close(soft_alignment(similarity[:1], k=9), torch.tensor([(0.6 + 0.4 + 0.15) / 0.95]))
    assert soft_alignment(-similarity.abs()).isnan().all()


@given(layers=strategies.integers(1, 12), seed=strategies.integers(0, 100))
def test_the_alignment_is_the_formula(layers: int, seed: int) -> None:
    similarity = torch.rand(3, layers, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    for row, depth in zip(similarity.tolist(), soft_alignment(similarity).tolist(), strict=True):
        best = sorted(range(layers), key=lambda j: -row[j])[:5]
        assert depth == pytest.approx(sum(row[j] * j for j in best) / sum(row[j] for j in best))
