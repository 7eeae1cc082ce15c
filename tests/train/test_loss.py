"""The head's loss in chunks against logits held whole, and its kernel against its twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_engram.data import IGNORE_INDEX
from torch_engram.models import Decoder, DecoderConfig
from torch_engram.models.decoder import MASKED_LOGIT
from torch_engram.train import loss as module
from torch_engram.train.loss import head_loss, head_loss_naive, head_losses, turn_into_gradient_naive
from torch_engram.train.loss_kernels import turn_into_gradient_triton

KERNELS = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def targets_of(tokens: int, vocab: int) -> Tensor:
    targets = torch.randint(vocab, (tokens,))
    targets[torch.rand(tokens) < 0.3] = IGNORE_INDEX
    return targets


def pad_bias(vocab: int, real: int) -> Tensor:
    return torch.zeros(vocab).masked_fill(torch.arange(vocab) >= real, MASKED_LOGIT)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 64), (9, 1000), (2, 9001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_kernel_equals_its_twin(shape: tuple[int, int], dtype: torch.dtype, padded: bool) -> None:
    tokens, vocab = shape
    real = max(1, vocab - 3)
    logits = (3 * torch.randn(shape)).to(KERNELS, dtype)
    targets = targets_of(tokens, real).to(KERNELS)
    bias = pad_bias(vocab, real).to(KERNELS) if padded else None
    scale = torch.tensor(0.25, device=KERNELS)
    losses, gradient = turn_into_gradient_naive(logits, targets, bias, scale)
    kept = logits.clone()
    torch.testing.assert_close(turn_into_gradient_triton(kept, targets, bias, None), losses, rtol=1e-5, atol=1e-5)
    assert torch.equal(kept, logits)
    torch.testing.assert_close(turn_into_gradient_triton(kept, targets, bias, scale), losses, rtol=1e-5, atol=1e-5)
    slack = dict(rtol=1e-4, atol=1e-7) if dtype == torch.float32 else dict(rtol=2**-7, atol=1e-7)
    torch.testing.assert_close(kept, gradient, **slack)
    if padded:
        assert not kept[:, real:].any()


def test_hopeless_logits_stay_finite() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4]], device=KERNELS)
    targets = torch.tensor([1, 2], device=KERNELS)
    losses = turn_into_gradient_triton(logits, targets, None, torch.ones((), device=KERNELS))
    torch.testing.assert_close(losses.cpu(), torch.tensor([6e4, torch.tensor(3.0).log()]))
    torch.testing.assert_close(logits.cpu(), torch.tensor([[1.0, -1.0, 0.0], [1 / 3, 1 / 3, -2 / 3]]))


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_chunks_equal_the_whole(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, chunk: int, padded: bool, autocast: bool, fused: bool
) -> None:
    if fused and device != KERNELS:
        pytest.skip("compiled kernels take tensors of the GPU alone")
    monkeypatch.setattr(module, "_CHUNK_LOGITS", chunk)
    if fused:
        monkeypatch.setattr(module, "turn_into_gradient", turn_into_gradient_triton)
    hidden, weight = torch.randn(2, 11, 8), torch.randn(37, 8)
    hidden, weight = (x.to(device).requires_grad_() for x in (hidden, weight))
    targets = targets_of(22, 30).view(2, 11).to(device)
    bias = pad_bias(37, 30).to(device) if padded else None
    results = []
    for function, divisor in ((head_loss_naive, ()), (head_loss, (torch.tensor(14.0, device=device),))):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = function(hidden, weight, targets, bias, *divisor)
        assert loss.dtype == torch.float32
        loss = loss if divisor else loss / 14
        results.append([loss, *torch.autograd.grad(3 * loss, (hidden, weight))])
    slack = dict(rtol=2**-5, atol=2**-5) if autocast else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1], results[0], **slack)


def test_losses_of_tokens(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 90)
    hidden, weight, targets = torch.randn(2, 11, 8), torch.randn(37, 8), targets_of(22, 37).view(2, 11)
    hidden, weight, targets = hidden.to(device), weight.to(device), targets.to(device)
    got = head_losses(hidden, weight, targets)
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(got, expected.view(2, 11))
    assert torch.equal(head_loss(hidden, weight, targets), got.sum())


def test_no_targets_no_loss() -> None:
    hidden = torch.randn(3, 8).requires_grad_()
    loss = head_loss(hidden, torch.randn(5, 8), torch.full((3,), IGNORE_INDEX))
    loss.backward()
    assert loss == 0 and hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_learns_the_same(tied: bool) -> None:
    config = DecoderConfig(40, hidden=16, layers=1, heads=2, ffn_hidden=24, tie_embeddings=tied, real_vocab=37)
    decoder = Decoder(config)
    tokens = torch.randint(0, 37, (2, 9))
    targets = tokens.roll(-1, 1)
    whole = F.cross_entropy(decoder(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    expected = torch.autograd.grad(whole, list(decoder.parameters()))
    hidden = decoder(tokens, return_hidden=True)
    assert hidden.shape == (2, 9, 16)
    loss = head_loss(hidden, decoder.head.weight, targets, decoder.pad_bias)
    torch.testing.assert_close(loss, whole)
    got = torch.autograd.grad(loss, list(decoder.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
