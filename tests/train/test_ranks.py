"""A recipe on several ranks trains as one process does on as many tokens: real processes, gloo between them."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ranks import run_ranks
from torch_engram.data import IGNORE_INDEX, PackedBatches
from torch_engram.memory import MemoryBank
from torch_engram.stores import make_keys
from torch_engram.train import Recipe, Trainer
from torch_engram.train.build import require_capture
from torch_engram.train.evaluate import _share
from torch_engram.train.guards import deterministic_kernels
from torch_engram.train.metrics import read_metrics
from torch_engram.train.ranks import Ranks, _own_gpu, require_different

STEPS = 3
DENSE = ("weight", "optimizer")
CLOSE = dict(rtol=1e-3, atol=2e-5)
"""Sums of other shares round otherwise, and Adam divides by roots of them."""


def held(bank: MemoryBank) -> list[Tensor]:
    """Every table's values and planes of the rows that this rank holds, fp32."""
    bank.flush()
    shard = bank.shard
    rows = [torch.arange(table.rows) if shard is None else shard.of(0, table.rows) for table in bank.tables]
    return [
        bank.source(table).store.fetch(make_keys(table.space, own.to(bank.device))).view(torch.float32).cpu()
        for table, own in zip(bank.tables, rows, strict=True)
    ]


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Whole weights and optimiser state on the rank that leads; each rank's rows."""
    found = {f"weight {name}": tensor for name, tensor in trainer.decoder.state_dict().items()}
    for number, optimizer in enumerate(trainer.optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {number}.{index}.{key}": value for key, value in values.items()}
    kept = {name: tensor.detach().cpu().clone() for name, tensor in trainer.ranks.whole(found).items()}
    return kept | {f"{name} {n}": rows for name, bank in trainer.banks.items() for n, rows in enumerate(held(bank))}


def steps_of(recipe: Recipe) -> dict[str, Any]:
    group = dist.group.WORLD if dist.is_initialized() else None
    trainer = Trainer(recipe, group=group)
    if recipe.name == "compiled":  # what compile=true does, without the compiler's time
        trainer.decoder.compile_blocks(backend="aot_eager", dynamic=False)
    trainer.decoder.train()
    told = []
    with deterministic_kernels(recipe.deterministic):
        for trainer.step in range(1, STEPS + 1):
            told.append([float(value) for value in trainer.train_step()])
    file = trainer.validation_file()
    assert file is not None
    scores = [trainer.score(file, batches) for batches in (1, None)]
    return {"told": told, "scores": [(score.nats, score.tokens) for score in scores], "state": state(trainer)}


def all_of(recipes: list[Recipe]) -> list[dict[str, Any]]:
    return [steps_of(recipe) for recipe in recipes]


def assert_ranks_tell_the_same_as_one(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["told"]), torch.tensor(one["told"]), rtol=1e-4, atol=1e-5)
        assert [tokens for _, tokens in rank["scores"]] == [tokens for _, tokens in one["scores"]]
        assert [nats for nats, _ in rank["scores"]] == pytest.approx([nats for nats, _ in one["scores"]], rel=1e-4)
        assert rank["told"] == ranks[0]["told"] and rank["scores"] == ranks[0]["scores"]


def assert_ranks_equal_one(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    assert_ranks_tell_the_same_as_one(ranks, one)
    assert_close(ranks[0]["state"], one["state"], only=DENSE)
    for number, rank in enumerate(ranks):
        rows = {name: rows[number :: len(ranks)] for name, rows in one["state"].items() if not name.startswith(DENSE)}
        assert_close(rank["state"], rows)
        assert number == 0 or rank["state"].keys() == rows.keys()


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], only: tuple[str, ...] = ("",)) -> None:
    for name, expected in theirs.items():
        if name.startswith(only):
            torch.testing.assert_close(mine[name], expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def same_bits(left: dict[str, Any], right: dict[str, Any]) -> bool:
    bits = all(torch.equal(left["state"][name], right["state"][name]) for name in left["state"])
    return bits and left["told"] == right["told"] and left["scores"] == right["scores"]


@pytest.fixture
def recipes(make_recipe) -> list[Recipe]:
    """Experts with accumulation; an untied head, with graphs, recompute and clipping; bf16."""
    base = make_recipe(steps=STEPS + 1, accumulation=2, table={"prefetch": 1})
    dense = replace(base.model, moe=None, tie_embeddings=False)
    other = replace(base, name="compiled", model=dense, recompute=True, accumulation=1, clip=0.1)
    return [base, other, replace(other, name="mixed", dtype="bf16", deterministic=True)]


def test_two_ranks_train_as_one_and_each_time_alike(recipes, text):
    every = run_ranks(2, all_of, [*recipes, recipes[0]])  # the first one twice
    for number, recipe in enumerate(recipes):
        one = steps_of(replace(recipe, name="one", accumulation=2 * recipe.accumulation))
        if recipe.dtype == "fp32":
            assert_ranks_equal_one([rank[number] for rank in every], one)
        else:
            assert [rank[number]["told"][0][0] for rank in every] == pytest.approx([one["told"][0][0]] * 2, rel=1e-3)
    assert all(same_bits(rank[0], rank[3]) for rank in every)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # compilers warn of what could be faster
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_and_each_time_alike(make_recipe, text):
    base = make_recipe(steps=STEPS + 1, accumulation=2, device="cuda", deterministic=True, table={"prefetch": 1})
    engrams = {"engram": replace(base.model.engrams["engram"], hidden=32)}
    wider = replace(base.model, hidden=32, head_dim=16, moe=None, engrams=engrams)
    recipe = replace(base, model=wider)
    host = replace(recipe, name="host", table=replace(recipe.table, placement="host"))
    every = run_ranks(2, all_of, [recipe, host], device="cuda")
    one = steps_of(replace(recipe, name="one", accumulation=4))
    assert_ranks_tell_the_same_as_one([rank[0] for rank in every], one)  # Adam makes much of how small gradients round
    assert all(same_bits(rank[0], rank[1]) for rank in every)


def steps_and_refusal(recipe: Recipe, saved: Recipe) -> tuple[dict[str, Any], str]:
    with pytest.raises(ValueError) as refused:
        Trainer(saved, resume_run=True, group=dist.group.WORLD)
    return steps_of(recipe), str(refused.value)


def test_three_ranks_and_what_does_not_divide_by_three(recipes, text):
    saved = replace(recipes[0], name="saved", steps=1)  # with an accumulation of 2
    Trainer(saved, text=text).run()
    recipe = replace(recipes[0], accumulation=1)
    every = run_ranks(3, steps_and_refusal, recipe, saved)
    assert_ranks_equal_one([rank[0] for rank in every], steps_of(replace(recipe, accumulation=3)))
    assert all(
        "was trained on other data or batches: its steps are of 2 micro-batches, and these, on 3 ranks, of 6; "
        "start as many ranks as divide 2." in refusal
        for _, refusal in every
    )


def run_to(recipe: Recipe, stop: int, resume: bool) -> dict[str, Any]:
    """Run until ``stop`` and save, as after Ctrl-C, or to the end."""

    def watch(progress: Any) -> None:
        if progress.step == stop < recipe.steps:
            trainer._stop = True

    trainer = Trainer(recipe, resume_run=resume, group=dist.group.WORLD if dist.is_initialized() else None)
    outcome = trainer.run(watch)
    return {"step": outcome.step, "score": outcome.score, "state": state(trainer)}


def save_on_a_full_disk(recipe: Recipe) -> str:
    trainer = Trainer(recipe, group=dist.group.WORLD)
    trainer.decoder.train()
    trainer.train_step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if dist.get_rank() == 0 else soft, hard))
    try:
        with pytest.raises(ValueError) as refused:
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return str(refused.value)


def resume_and_fail(begins: Recipe, goes_on: Recipe, fails: Recipe) -> tuple[dict[str, Any], dict[str, Any], str]:
    return run_to(begins, 3, False), run_to(goes_on, goes_on.steps, True), save_on_a_full_disk(fails)


def test_a_run_goes_on_with_another_number_of_ranks(recipes):
    alone = replace(recipes[0], steps=6, name="alone")
    whole = run_to(alone, 6, False)
    goes_on = replace(alone, name="one-then-two")
    run_to(goes_on, 3, False)
    shared = dict(accumulation=1)
    begins, fails = replace(alone, name="two-then-one", **shared), replace(alone, name="full", **shared)
    every = run_ranks(2, resume_and_fail, begins, replace(goes_on, **shared), fails)
    assert [rank[0]["step"] for rank in every] == [3, 3]
    assert_close(every[0][1]["state"], whole["state"], only=DENSE)
    assert all(rank[1]["score"].nats == pytest.approx(whole["score"].nats, rel=1e-4) for rank in every)
    second = run_to(replace(begins, accumulation=2), 6, True)
    assert_close(second["state"], whole["state"])
    folder = Path(alone.out) / "full"
    assert every[0][2] == every[1][2] and "File too large" in every[0][2]
    assert every[0][2].startswith(f"Cannot save {folder / 'step-00000000'} (")
    assert os.listdir(folder) == []
    lines = [
        [line["loss"] for line in read_metrics(Path(alone.out) / name) if "loss" in line]
        for name in ("alone", "one-then-two", "two-then-one")
    ]
    assert len(lines[0]) == 6 and lines[1] == pytest.approx(lines[0], rel=1e-4)
    assert lines[2] == pytest.approx(lines[0], rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("wanted", [None, 1, 3])
def test_ranks_share_a_split(text, size, wanted):
    """Every batch is scored once, and every rank reads as often."""
    data = PackedBatches(text.files.validation, 2, 16)
    shares = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        shares.append(list(_share(data, wanted, ranks)))
    assert len({len(share) for share in shares}) == 1
    scored = [batch for turn in zip(*shares, strict=True) for batch in turn if (batch.targets != IGNORE_INDEX).any()]
    expected = list(islice(data.in_order(), wanted))
    assert [batch.tokens.tolist() for batch in scored] == [batch.tokens.tolist() for batch in expected]
    assert [batch.targets.tolist() for batch in scored] == [batch.targets.tolist() for batch in expected]


def test_what_ranks_cannot_do_is_refused(make_recipe):
    with pytest.raises(ValueError, match=r"capture=true is for one process, .* 2 ranks: set capture=false"):
        require_capture(make_recipe(capture=True, device="cuda"), 2)


def test_ranks_have_a_gpu_each(monkeypatch):
    require_different(["a", "b", "c"])
    with pytest.raises(ValueError, match="Ranks 1 and 3 see the same GPU alone: give each its own, or all to all"):
        require_different(["a", "b", "c", "b"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # by whoever started the ranks
    assert [_own_gpu(rank, 4) for rank in range(4)] == [0] * 4
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [_own_gpu(rank, 3) for rank in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="4 ranks with device=cuda need a GPU each, and PyTorch sees 3: start 3"):
        _own_gpu(0, 4)
