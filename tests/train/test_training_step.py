"""What one step of training does: loss, clipping, schedules, optimisers by role, balance, evaluation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from torch_engram.data import IGNORE_INDEX
from torch_engram.memory import Tokens
from torch_engram.train import evaluate
from torch_engram.train.muon import Muon


def test_training_learns(make_trainer):
    losses = []
    make_trainer(steps=40, warmup=5).run(lambda progress: losses.append(progress.loss))
    assert losses[0] == pytest.approx(math.log(300), abs=0.3)
    assert sum(losses[-5:]) / 5 < losses[0] - 1


def test_the_loss_is_the_mean_over_all_targets_of_the_step(make_trainer, begin_uneven):
    trainer, twin = make_trainer(name="a"), make_trainer(name="b")
    total, count, step = 0.0, 0, begin_uneven(trainer)
    with torch.no_grad():
        for number in range(2):
            batch = twin.data.batch(step * 2 + number)
            memory = twin.banks["engram"].read(Tokens(batch.tokens, doc_start=batch.doc_start))
            logits = twin.decoder(batch.tokens, memory, doc_start=batch.doc_start)
            total += float(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"))
            count += int((batch.targets != IGNORE_INDEX).sum())
    assert float(trainer.train_step()[0]) == pytest.approx(total / count, rel=1e-5)


def test_row_gradients_count_in_the_clipped_norm(make_trainer, monkeypatch):
    """The norm is that of weights and rows together, and after clipping both have been scaled by the same factor."""
    trainer = make_trainer(clip=0.01)
    grads = {}

    def spy(parameters, limit, **options):
        def squares(of):
            return sum(float(p.grad.double().square().sum()) for p in of if p.grad is not None)

        parameters = list(parameters)
        rows = [p for p in parameters if not any(p is q for q in trainer.decoder.parameters())]
        grads["rows before"], grads["all before"] = squares(rows), squares(parameters)
        found = clip(parameters, limit, **options)
        grads["rows after"], grads["all after"] = squares(rows), squares(parameters)
        return found

    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    trainer.train_step()  # zero initial convolution and gates may hide rows at the first step, so look at the second
    _, norm = trainer.train_step()
    assert grads["rows before"] > 0
    assert float(norm) == pytest.approx(math.sqrt(grads["all before"]), rel=1e-4)
    assert math.sqrt(grads["all after"]) == pytest.approx(0.01, rel=1e-3)
    scale = grads["all after"] / grads["all before"]
    assert grads["rows after"] == pytest.approx(grads["rows before"] * scale, rel=1e-3)


def test_clip_zero_scales_nothing_and_still_measures(make_trainer, state_of, assert_same):
    free, huge = make_trainer(name="free", clip=0.0), make_trainer(name="huge", clip=1e9)
    (_, norm), _ = free.train_step(), huge.train_step()
    assert_same(state_of(free), state_of(huge))
    assert float(norm) > 0


def test_schedules_reach_every_optimiser_the_rows_too(make_trainer):
    trainer = make_trainer(steps=4, warmup=2, floor=0.1, schedule="linear")
    row_optimizer = trainer.banks["engram"].optimizer
    muon, adam = trainer.optimizers
    seen = []
    for _ in range(4):
        seen.append([row_optimizer.param_groups[0]["lr"], muon.param_groups[0]["lr"], adam.param_groups[0]["lr"]])
        trainer.train_step()
    factors = [0.5, 1.0, 1.0, 0.55]
    peaks = [trainer.recipe.table.lr, trainer.recipe.rates.matrices, trainer.recipe.rates.embedding]
    assert seen == [pytest.approx([factor * peak for peak in peaks]) for factor in factors]


def test_the_logged_rate_is_the_one_that_the_step_used(make_trainer, lines_of):
    trainer = make_trainer(steps=4, warmup=2, floor=0.1, schedule="linear", rates={"matrices": 0.0})
    trainer.run()
    assert [line["lr_factor"] for line in lines_of(trainer) if "loss" in line] == pytest.approx([0.5, 1.0, 1.0, 0.55])


def test_tables_have_their_own_rate_and_no_weight_decay(make_trainer, state_of):
    """With rate 0 for rows their values stay, decay or not; with rate 0 for the backbone it stays and rows move."""
    rates = {"weight_decay": 0.5}
    frozen_rows = make_trainer(name="rows", table={"lr": 0.0}, rates=rates)
    none = dict.fromkeys(("matrices", "embedding", "head", "router", "other"), 0.0)
    frozen_rest = make_trainer(name="rest", rates=none | rates)
    start = state_of(frozen_rows)
    values = frozen_rows.banks["engram"]
    for trainer in (frozen_rows, frozen_rest):
        for _ in range(3):
            trainer.train_step()

    def rows(trainer):
        bank = trainer.banks["engram"]
        table = bank.tables[0]
        state = state_of(trainer)[f"table engram.{table.space}"]
        planes = bank.source(table).format.decode(torch.arange(table.rows), state)
        return planes["value"], planes["count"].squeeze(1)

    fresh, _ = rows(make_trainer(name="fresh"))
    value, count = rows(frozen_rows)
    assert values.optimizer.param_groups[0]["lr"] == 0 and (count > 0).any()
    assert torch.equal(value, fresh)
    value, count = rows(frozen_rest)
    assert (value != fresh).any(1)[count > 0].any() and torch.equal(value[count == 0], fresh[count == 0])
    weights = {name for name in start if name.startswith("weight") and not name.endswith(".bias")}
    end = state_of(frozen_rest)
    assert not [name for name in weights if not torch.equal(start[name], end[name])]


def test_every_parameter_has_one_optimiser_and_matrices_have_muon(make_trainer):
    base = make_trainer().recipe.model
    trainer = make_trainer(model=replace(base, tie_embeddings=False, branches=1))
    muon, adam = trainer.optimizers
    assert isinstance(muon, Muon) and isinstance(adam, torch.optim.Adam)
    names = {id(parameter): name for name, parameter in trainer.decoder.named_parameters()}
    held = [id(p) for optimizer in (muon, adam) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(names)
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    # Everything inside a block with two dimensions or more, but routers and the convolution's taps.
    expected = {
        name
        for name, parameter in trainer.decoder.named_parameters()
        if name.startswith("blocks.") and min(parameter.shape) > 1 and parameter.ndim >= 2 and "router" not in name
    }
    assert matrices == expected
    assert {len(parameter.shape) for group in muon.param_groups for parameter in group["params"]} == {2, 3}
    rates = trainer.recipe.rates
    of = {names[id(p)]: group["initial_lr"] for group in adam.param_groups for p in group["params"]}
    assert of["embedding.weight"] == rates.embedding and of["head.weight"] == rates.head
    assert of["blocks.0.ffn.router"] == rates.router and of["norm.weight"] == rates.other
    assert {group.get("weight_decay") for group in adam.param_groups} == {0}


def test_balancing_lowers_the_peak_load(make_trainer, lines_of):
    """Experts that start lopsided: with the bias at work the busiest expert's share falls, without it it stays."""
    peaks = {}
    for rate in (0.0, 0.005):
        none = dict.fromkeys(("matrices", "embedding", "head", "router", "other"), 0.0)
        trainer = make_trainer(name=f"balance-{rate}", balance_rate=rate, steps=40, rates=none, eval_every=100)
        for block in trainer.decoder.blocks:
            block.ffn.bias[0] = 0.2  # everybody's first choice
        trainer.run()
        loads = [line["expert_peak_load"] for line in lines_of(trainer) if "loss" in line]
        peaks[rate] = (loads[0], sum(loads[-5:]) / 5)
    assert peaks[0.0][1] == pytest.approx(2.0)  # expert 0 of 4 has every token of 2 choices: twice the mean
    assert peaks[0.005][0] == pytest.approx(2.0) and peaks[0.005][1] < 1.7


def test_evaluation_changes_nothing_and_reads_the_whole_split(make_trainer, state_of, assert_same, text):
    trainer = make_trainer()
    trainer.train_step()
    trainer.decoder.train()
    before = state_of(trainer)
    loads = [block.ffn.load.clone() for block in trainer.decoder.blocks]
    file = trainer.validation_file()
    score = evaluate(trainer.decoder, trainer.banks, file, batch_size=3, seq_len=16)
    assert_same(before, state_of(trainer))
    assert all(torch.equal(load, block.ffn.load) for load, block in zip(loads, trainer.decoder.blocks, strict=True))
    assert trainer.decoder.training
    windows = (len(file) - 1) // 16
    starts = int(((file.starts > 0) & (file.starts <= windows * 16)).sum())
    assert score.tokens == windows * 16 - starts  # a document's first token is nobody's target
    bytes_per_token = file.text_bytes / len(file)
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / bytes_per_token)
    by_one = evaluate(trainer.decoder, trainer.banks, file, batch_size=1, seq_len=16)
    assert by_one.tokens == score.tokens and by_one.nats == pytest.approx(score.nats, rel=1e-5)


def test_share_seen_and_tokens_per_step(make_trainer):
    trainer = make_trainer()
    trainer.run()
    assert trainer.recipe.tokens_per_step == 2 * 2 * 16
    assert trainer.share_seen == pytest.approx(6 * 64 / len(trainer.text.files.train))


def test_deterministic_kernels_are_asked_for_during_the_run_alone(make_trainer):
    seen = []
    make_trainer(deterministic=True).run(lambda progress: seen.append(torch.are_deterministic_algorithms_enabled()))
    make_trainer(name="free").run(lambda progress: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert seen[0] and not seen[-1] and not torch.are_deterministic_algorithms_enabled()
