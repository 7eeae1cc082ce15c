"""The page on training in loops of others runs as it is printed, and its loops train the same, bit for bit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_engram.memory import MemoryBank

PAGE = Path(__file__).parents[1] / "docs" / "own-loop.md"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # transformers and accelerate tell what could be faster

Records = Callable[[MemoryBank], list[Tensor]]
Page = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """What each section's code leaves behind, run in an empty folder after the sections before it."""
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")
    assert [title.partition("\n")[0] for title in sections[1:]] == [
        "Fifteen lines", "Hugging Face's Trainer", "A loop like torchtitan's"
    ]  # fmt: skip
    names: dict[str, Any] = {"__name__": "page"}
    left = {}
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("page"))
    try:
        for section, key in zip(sections, ("shared", "own", "trainer", "titan"), strict=True):
            for code in PYTHON.findall(section):
                exec(compile(code, f"{PAGE.name}, {key}", "exec"), names)
            left[key] = dict(names)
    finally:
        os.chdir(before)
    return left


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """By the names that they have without recompute."""
    state = model.state_dict()
    return {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in state.items()}


def assert_trained_alike(own: dict[str, Any], model: torch.nn.Module, bank: MemoryBank, every_record: Records) -> None:
    mine, theirs = weights(own["model"]), weights(model)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    for rows, other in zip(every_record(own["bank"]), every_record(bank), strict=True):
        assert torch.equal(rows, other)


def test_fifteen_lines_learn(page: Page) -> None:
    loop = PAGE.read_text(encoding="utf-8").partition("\ncoming = ")[2].partition("```")[0]
    assert len(loop.splitlines()) == 15
    own = page["own"]
    assert own["rows"].done and own["norm"] > own["CLIP"]  # so whatever the norm leaves out would show
    start, bank = page["shared"]["build"]()
    first = own["steps"][0][0]
    assert own["loss"] < start(first, first, bank.read(first))["loss"] - 0.5


def test_the_trainer_of_transformers_trains_the_same(page: Page, every_record: Records) -> None:
    trainer = page["trainer"]["trainer"]
    assert_trained_alike(page["own"], trainer.model, trainer.bank, every_record)
    told = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert len(told) == page["own"]["STEPS"]
    assert told[-1]["grad_norm"] == page["own"]["norm"].item()


def test_the_rates_of_the_rows_follow_the_trainers_scheduler(page: Page) -> None:
    trainer = page["trainer"]["make_trainer"]()
    steps = page["own"]["STEPS"]
    trainer.create_optimizer_and_scheduler(steps)
    for step in range(steps):
        assert trainer.bank.optimizer.param_groups[0]["lr"] == 1e-2 * ((steps - step) / steps)
        trainer.optimizer._opt_called = True  # no step is needed to look at rates
        trainer.lr_scheduler.step()


def test_its_checkpoints_hold_the_rows(page: Page, every_record: Records) -> None:
    resumed = page["trainer"]["resumed"]
    assert resumed.state.global_step == page["own"]["STEPS"]
    assert_trained_alike(page["own"], resumed.model, resumed.bank, every_record)


def test_steps_of_fewer_micro_batches_and_further_epochs(page: Page, tmp_path: Path, every_record: Records) -> None:
    """Three batches an epoch are a step of two and a step of one."""
    names, examples = page["trainer"], page["shared"]["examples"][:6]
    arguments = names["transformers"].TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", save_strategy="no", report_to="none",
        max_grad_norm=0.0, logging_steps=1, use_cpu=True,
    )  # fmt: skip
    model, bank = names["build"]()
    optimizer = names["JoinedOptimizer"](torch.optim.AdamW(model.parameters()), bank)
    trainer = names["MemoryTrainer"](
        bank, model=model, args=arguments, train_dataset=examples, optimizers=(optimizer, None)
    )
    trainer.train()

    model, bank = names["build"]()
    optimizer = torch.optim.AdamW(model.parameters())
    batches = list(torch.stack([example["input_ids"] for example in examples]).split(2))
    norms = []
    for step in [batches[:2], batches[2:]] * 2:
        rows = bank.prefetch(*step)
        for micro, tokens in enumerate(step):
            (model(tokens, tokens, rows[micro])["loss"] / len(step)).backward()
        rows.reduce()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in (*model.parameters(), *bank.parameters())])))
        optimizer.step()
        optimizer.zero_grad()
        rows.apply()
    assert_trained_alike({"model": model, "bank": bank}, trainer.model, trainer.bank, every_record)
    assert [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line] == norms


def test_its_evaluation_reads_the_rows(page: Page, every_record: Records) -> None:
    trainer = page["trainer"]["trainer"]
    before = every_record(trainer.bank)
    examples = page["shared"]["examples"]
    score = trainer.evaluate(examples)["eval_loss"]
    tokens = torch.stack([example["input_ids"] for example in examples])
    with torch.no_grad():
        assert score == pytest.approx(float(trainer.model(tokens, tokens, trainer.bank.read(tokens))["loss"]))
    assert all(map(torch.equal, before, every_record(trainer.bank)))


def test_a_loop_like_torchtitans_trains_the_same(page: Page, every_record: Records) -> None:
    titan = page["titan"]
    assert all("_checkpoint_wrapped_module" in dict(block.named_children()) for block in titan["model"].blocks)
    assert_trained_alike(page["own"], titan["model"], titan["bank"], every_record)
    assert torch.equal(titan["grad_norm"], page["own"]["norm"])
