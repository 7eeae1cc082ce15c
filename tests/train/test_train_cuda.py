"""The same on a GPU: bf16, compiled, recomputed; resumed bit for bit under deterministic kernels; decoded there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from torch_engram.generate import generate
from torch_engram.train import open_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # compilers warn of what could be faster


@pytest.fixture
def make_trainer(make_trainer, base_recipe):
    """Heads of 16, the least that FlexAttention takes on a GPU."""
    model = base_recipe.model
    engrams = {"engram": replace(model.engrams["engram"], hidden=32)}
    wider = replace(model, hidden=32, head_dim=16, engrams=engrams)
    return lambda **changes: make_trainer(**{"model": wider, **changes})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("extra", [{}, {"compile": True}, {"compile": True, "recompute": True}])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_it_learns(make_trainer, dtype, extra, placement):
    table = {"placement": placement, "prefetch": 2}
    trainer = make_trainer(device="cuda", dtype=dtype, steps=30, warmup=3, table=table, **extra)
    losses = []
    outcome = trainer.run(lambda progress: losses.append(progress.loss))
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    assert outcome.score is not None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_continues_bit_for_bit(make_trainer, run_steps, state_of, assert_same, lines_of, dtype, prefetch):
    settings = dict(device="cuda", dtype=dtype, deterministic=True, table={"prefetch": prefetch})
    whole = make_trainer(name="whole", **settings)
    whole.run()
    run_steps(make_trainer(**settings), 3)
    resumed = make_trainer(resume_run=True, **settings)
    resumed.run()
    assert_same(state_of(resumed), state_of(whole))
    assert lines_of(resumed) == lines_of(whole)


@pytest.mark.parametrize("table", [{"prefetch": 3}, {"placement": "host"}, {"placement": "host", "prefetch": 1}])
def test_prefetch_and_placement_change_no_bit(make_trainer, state_of, assert_same, table):
    settings = dict(device="cuda", dtype="bf16", deterministic=True)
    plain, other = make_trainer(name="plain", **settings), make_trainer(name="other", **settings, table=table)
    plain.run()
    other.run()
    assert_same(state_of(plain), state_of(other))


def test_recompute_and_compile_in_fp8_learn_the_same(make_trainer):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with FP8 products")
    losses = {False: [], True: []}
    for changed, found in losses.items():
        trainer = make_trainer(
            name=f"run-{changed}",
            device="cuda",
            dtype="bf16",
            steps=30,
            warmup=3,
            fp8=True,
            compile=changed,
            recompute=changed,
        )
        trainer.run(lambda progress, found=found: found.append(progress.loss))
    assert losses[True][-1] < losses[True][0] - 0.5
    assert losses[True] == pytest.approx(losses[False], abs=0.2)


def test_recompute_changes_no_bit(make_trainer, state_of, assert_same):
    settings = dict(device="cuda", dtype="bf16", deterministic=True)
    kept, again = make_trainer(name="kept", **settings), make_trainer(name="again", recompute=True, **settings)
    kept.run()
    again.run()
    assert_same(state_of(kept), state_of(again))


def test_a_checkpoint_of_the_gpu_opens_anywhere_and_decodes_the_same(make_trainer, text):
    trainer = make_trainer(device="cuda", steps=40, warmup=3)
    trainer.run()
    prompts = [text.tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in ("the king", "a", "the")]
    written = {}
    for device in ("cpu", "cuda"):
        loaded = open_checkpoint(trainer.folder, device)
        written[device] = generate(loaded.decoder, loaded.banks, prompts, max_new_tokens=6)
        assert written[device] == [
            generate(loaded.decoder, loaded.banks, [prompt], max_new_tokens=6)[0] for prompt in prompts
        ]
    assert written["cpu"] == written["cuda"]
