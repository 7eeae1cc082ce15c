"""Compilation, recompute, accumulation and graph capture, each alone and all together: the same training."""

from __future__ import annotations

from dataclasses import replace
from itertools import compress, product

import pytest
import torch

from torch_engram.models import DecoderConfig
from torch_engram.train import Trainer
from torch_engram.train.build import require_capture

# Compilers warn of what could be faster.
pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = ("compile", "recompute", "accumulation", "capture")
STEPS = 6
every_subset = pytest.mark.parametrize(
    "options",
    [
        pytest.param(chosen, marks=pytest.mark.gpu if "capture" in chosen else (), id="+".join(chosen) or "none")
        for switches in product((False, True), repeat=len(OPTIONS))
        for chosen in [tuple(compress(OPTIONS, switches))]
    ],
)


def one_layer(model: DecoderConfig) -> DecoderConfig:
    """Its only block has a memory. No experts: they choose by comparing, which rounding may tip."""
    engram = replace(model.engrams["engram"], layers=(0,), hidden=32)
    return replace(model, layers=1, hidden=32, head_dim=None, moe=None, engrams={"engram": engram})


@pytest.fixture
def losses_with(make_trainer):
    """The losses of some steps under some of the options; every step has the same four sequences."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def train(options, **changes):
        micro = (
            {"batch_size": 2, "accumulation": 2} if "accumulation" in options else {"batch_size": 4, "accumulation": 1}
        )
        flags = {name: True for name in options if name != "accumulation"}
        model = one_layer(make_trainer(name="base").recipe.model)
        trainer = make_trainer(
            **{"name": "other", "model": model, "device": device, "table": {"prefetch": 1}, **micro, **flags, **changes}
        )
        trainer.decoder.train()
        return [float(trainer.train_step()[0]) for _ in range(STEPS)]

    return train


@pytest.fixture(scope="module")
def kept() -> dict[str, list[float]]:
    """What was trained once for all tests."""
    return {}


@every_subset
def test_any_of_them_learn_the_same(losses_with, options, kept):
    plain = kept.get("plain") or kept.setdefault("plain", losses_with((), name="plain"))
    assert plain[-1] < plain[0] - 0.1
    assert losses_with(options) == pytest.approx(plain, rel=2e-4)


def clipped_norms(trainer: Trainer) -> list[tuple[float, float]]:
    """Train some steps; for each the norm of the weights' gradients that is stepped with, and that of the rows'."""
    groups = (trainer.optimizers, [bank.optimizer for bank in trainer.banks.values()])
    squares: list[list[float]] = []

    def note(optimizer, *_):
        which = 1 if optimizer in groups[1] else 0
        for group in optimizer.param_groups:
            squares[-1][which] += sum(
                float(p.grad.double().square().sum()) for p in group["params"] if p.grad is not None
            )

    for optimizer in (*groups[0], *groups[1]):
        optimizer.register_step_pre_hook(note)
    trainer.decoder.train()
    for _ in range(STEPS):
        squares.append([0.0, 0.0])
        trainer.train_step()
    return [(weights**0.5, rows**0.5) for weights, rows in squares]


@pytest.mark.parametrize("capture", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_all_together_with_clipping_and_mixed_precision(make_trainer, state_of, assert_same, capture):
    """Compiled, recomputed, accumulated, clipped with the rows in the norm, in bf16, on a GPU captured: tables on the
    host, prefetched two steps ahead, train what a table on the device does, bit for bit, and that is about what fp32
    learns with none of the options but the same clipping."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = one_layer(make_trainer(name="base").recipe.model)
    fixed = dict(model=model, device=device, deterministic=True, clip=0.05)
    options = dict(dtype="bf16", compile=True, recompute=True, capture=capture, batch_size=2, accumulation=2)
    host = make_trainer(name="host", **fixed, **options, table={"placement": "host", "prefetch": 2})
    here = make_trainer(name="here", **fixed, **options)
    for weights, rows in clipped_norms(host):
        assert (weights**2 + rows**2) ** 0.5 == pytest.approx(0.05, rel=1e-3)  # together, so it was clipped together
        assert rows > 0.05 * weights > 0
    here.decoder.train()
    losses = [float(here.train_step()[0]) for _ in range(STEPS)]
    assert_same(state_of(host), state_of(here))
    plain = make_trainer(name="plain", **fixed, batch_size=4, accumulation=1)
    plain.decoder.train()
    assert losses == pytest.approx([float(plain.train_step()[0]) for _ in range(STEPS)], rel=1e-2)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{}, {"table": {"prefetch": 2, "placement": "host"}}, {"accumulation": 1}, {"accumulation": 3}]
)
def test_a_capture_changes_no_bit(make_trainer, state_of, assert_same, lines_of, changes):
    """With experts, validations and a resume in between; kernels that repeat make it visible. Three micro-batches:
    there is no graph yet for the last one of the first step."""
    shared = dict(device="cuda", dtype="bf16", deterministic=True, steps=8, eval_every=3, save_every=4, **changes)
    plain, captured = (make_trainer(name=f"capture-{on}", capture=on, **shared) for on in (False, True))
    for trainer in (plain, captured):
        trainer.run()
    assert_same(state_of(plain), state_of(captured))
    assert lines_of(plain) == lines_of(captured)


def test_what_cannot_be_captured_is_refused(make_recipe):
    with pytest.raises(ValueError, match=r"capture=true needs a GPU, .*: set device=cuda, or capture=false"):
        Trainer(make_recipe(capture=True))
    with pytest.raises(ValueError, match="capture=true with experts needs dtype=bf16"):
        require_capture(make_recipe(capture=True, device="cuda"))
