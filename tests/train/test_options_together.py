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
