"""Muon: batches are their matrices one by one, updates are orthogonal, and in two dimensions it is torch's own."""

from __future__ import annotations

import pytest
import torch

from torch_engram.train import muon
from torch_engram.train.muon import Muon, orthogonalise, orthogonalise_batch


@pytest.mark.parametrize("shape", [(8, 8), (6, 17), (17, 6), (1, 9)])
def test_singular_values_end_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(5, *shape)).float())
    assert values.max() < 1.3
    assert values.median() > 0.6
    well = torch.linalg.qr(torch.randn(5, 16, 16)).Q * torch.linspace(0.5, 2, 16)  # nothing near singular
    values = torch.linalg.svdvals(orthogonalise(well).float())
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_the_scale_of_a_gradient_does_not_matter_and_zero_stays_zero(shape):
    update = torch.randn(shape)
    torch.testing.assert_close(orthogonalise(update * 4096), orthogonalise(update), rtol=0.02, atol=0.02)
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(4, 12, 8), (4, 8, 12), (20, 8, 8)])
def test_a_stack_of_experts_is_each_matrix_alone(shape):
    start, grads = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    stack = torch.nn.Parameter(start.clone())
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    settings = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    one, many = Muon([stack], **settings), Muon(alone, **settings)
    for grad in grads:
        stack.grad = grad
        for parameter, own in zip(alone, grad, strict=True):
            parameter.grad = own
        one.step()
        many.step()
    torch.testing.assert_close(stack.data, torch.stack([p.data for p in alone]), rtol=1e-2, atol=1e-3)
    assert torch.equal(one.state[stack]["momentum"], torch.stack([many.state[p]["momentum"] for p in alone]))


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_in_two_dimensions_it_is_torchs(shape):
    start, grads = torch.randn(shape), [torch.randn(shape) for _ in range(4)]
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = dict(lr=0.02, momentum=0.95, weight_decay=0.1)
    ours = Muon([mine], **settings)
    reference = torch.optim.Muon([theirs], nesterov=True, adjust_lr_fn="match_rms_adamw", **settings)
    for grad in grads:
        mine.grad, theirs.grad = grad.clone(), grad.clone()
        ours.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (mine - theirs).norm() < 0.05 * moved  # both round to bf16 in every iteration, at other places
    assert torch.equal(ours.state[mine]["momentum"], reference.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(3, 6, 10), (1, 8, 8), (2, 1, 5)])
def test_a_batch_is_its_twin(shape):
    """Both round to bf16 in every iteration, at other places."""
    update = torch.randn(shape)
    twin = orthogonalise(update).float()
    assert (orthogonalise_batch(update.bfloat16()).float() - twin).norm() < 0.1 * twin.norm()


@pytest.mark.parametrize("most", [1, 100, 1 << 29])
def test_sizes_are_batched_and_split_as_memory_allows(monkeypatch, most):
    """Wide, tall and square matrices, alone and stacked, against the formula for one matrix at a time."""
    monkeypatch.setattr(muon, "_BATCH_NUMBERS", most)
    shapes = [(6, 10), (10, 6), (5, 6, 10), (4, 10, 6), (8, 8), (2, 8, 8), (6, 10), (2, 2, 10, 6)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    start = [parameter.detach().clone() for parameter in parameters]
    expected = [tensor.clone() for tensor in start]
    momenta = [torch.zeros(shape) for shape in shapes]
    optimizer = Muon(parameters, momentum=0.9, weight_decay=0.1)
    for rate in (0.02, 0.01):
        optimizer.param_groups[0]["lr"] = rate
        for number, parameter in enumerate(parameters):
            grad = torch.randn(parameter.shape)
            momenta[number] = 0.9 * momenta[number] + 0.1 * grad
            step = orthogonalise(0.1 * grad + 0.9 * momenta[number]).float()
            expected[number] = (1 - rate * 0.1) * expected[number] - rate * 0.2 * max(grad.shape[-2:]) ** 0.5 * step
            parameter.grad = grad.mT.contiguous().mT  # as some products leave it
        optimizer.step()
    for number, parameter in enumerate(parameters):
        assert (parameter - expected[number]).norm() < 0.1 * (parameter - start[number]).norm()
        torch.testing.assert_close(optimizer.state[parameter]["momentum"], momenta[number])
    assert {tuple(state) for state in optimizer.state.values()} == {("momentum",)}


def test_a_parameter_without_a_gradient_stays():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    Muon([parameter], weight_decay=0.5).step()
    assert torch.equal(parameter.data, torch.ones(4, 4))
