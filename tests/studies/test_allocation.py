"""Experts or tables: equal budgets, controls that are what they are called, and a report of it all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torch_engram.models.accounting import account
from torch_engram.stores import make_keys
from torch_engram.studies.allocation import FROZEN, SCALES, STUDY, TABLES, WITHOUT
from torch_engram.studies.controls import ONE_ROW, SHUFFLED, control
from torch_engram.studies.grid import run_grid
from torch_engram.studies.report import write_report
from torch_engram.studies.training import TrainingRun, made_ready, train_run
from torch_engram.train import Trainer, change

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")


@pytest.mark.parametrize("scale", SCALES)
def test_allocations_are_equal_in_total_and_active_parameters(scale: str) -> None:
    runs = [run for run in STUDY.grid(scale, 1) if run.label != WITHOUT]
    whole, *others = (account(run.recipe.model) for run in runs)
    assert whole.tables == 0 and all(each.tables for each in others)
    for each in others:
        assert each.total == pytest.approx(whole.total, rel=2e-3)
        assert each.active == pytest.approx(whole.active, rel=5e-2 if scale == "tiny" else 2.5e-3)


def test_every_number_of_experts_stands_beside_its_controls() -> None:
    runs = STUDY.grid("small")
    experts = {run.recipe.model.moe.experts for run in runs if run.recipe.model.moe is not None} - {56}
    assert len(experts) >= 6 and len(runs) == 3 * (len(experts) + 1) + 4 * len(experts)
    for label in (WITHOUT, ONE_ROW, SHUFFLED, FROZEN):
        mine = [run for run in runs if run.label == label]
        assert {run.recipe.model.moe.experts for run in mine if run.recipe.model.moe is not None} == experts
        assert all(bool(run.recipe.model.engrams) == (label != WITHOUT) for run in mine)
    assert all(run.recipe.table.lr == 0 for run in runs if run.label == FROZEN)


@pytest.fixture(scope="module")
def runs(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[TrainingRun]:
    cache = str(tmp_path_factory.mktemp("cache"))
    return made_ready(
        [replace(run, recipe=replace(run.recipe, cache=cache)) for run in STUDY.grid("tiny", 1)], corpus, "cpu"
    )


@pytest.fixture
def trainer(runs: list[TrainingRun], corpus: str, tmp_path: Path) -> Trainer:
    settings = ["device=cpu", "dtype=fp32", "compile=false", "capture=false", f"data={corpus}", f"out={tmp_path}"]
    return Trainer(change(runs[1].recipe, settings))


def rows_read(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """Of one batch: the rows without a control and as the trainer finds them, offsets and sizes of the heads."""
    (bank,) = trainer.banks.values()
    tokens, layer = trainer.data.batch(0).tokens, next(iter(bank.addressing.layouts))
    layout = bank.addressing.layouts[layer]
    plain = bank.addressing.rows(bank.addressing.windows(tokens), layer)[1]
    return plain, bank.addressing.lookup(tokens)(layer)[1], list(layout.offsets), list(layout.flat_primes)


def test_one_row_a_head_is_all_that_is_read_and_trained(trainer: Trainer) -> None:
    control(trainer, ONE_ROW)
    _, rows, offsets, _ = rows_read(trainer)
    assert all(rows[..., head].unique().tolist() == [offset] for head, offset in enumerate(offsets))
    trainer.train_step()
    (bank,) = trainer.banks.values()
    for table in bank.tables:
        first = bank.addressing.layouts[table.layer].offsets
        source = bank.source(table)
        keys = make_keys(table.space, torch.arange(table.rows))
        trained = source.format.decode(keys, source.store.fetch(keys))["count"].flatten() > 0
        assert trained.nonzero().flatten().tolist() == list(first)


def test_shuffled_rows_are_drawn_anew_for_every_occurrence(trainer: Trainer) -> None:
    control(trainer, SHUFFLED)
    plain, rows, offsets, sizes = rows_read(trainer)
    _, again, _, _ = rows_read(trainer)
    low, size = torch.tensor(offsets), torch.tensor(sizes)
    assert rows.shape == plain.shape and ((rows >= low) & (rows < low + size)).all()
    assert (rows != plain).float().mean() > 0.9 and (rows != again).float().mean() > 0.9
    assert rows.float().mean((0, 1)) == pytest.approx((low + size / 2).float(), rel=0.3)


def test_there_is_no_other_control(trainer: Trainer) -> None:
    with pytest.raises(ValueError, match="There is no control 'gate off': use 'one row a head' or 'shuffled rows'"):
        control(trainer, "gate off")


def test_the_study_from_its_runs_to_its_report(runs: list[TrainingRun], corpus: str, tmp_path: Path) -> None:
    lines = run_grid(runs, lambda run: train_run(run, corpus), tmp_path, study="allocation", scale="tiny", device="cpu")
    assert [line["result"]["steps"] for line in lines] == [6] * len(runs)
    report = STUDY.report(lines)
    write_report(report, tmp_path)
    (section,) = report.sections
    assert [row[0] for row in section.rows].count(TABLES) == 3 and len(section.rows) == 3 + 4 * 2
    assert len({row[1] for row in section.rows}) == 3  # controls stand where their tables do
    assert section.head[-1] == "to tables" and all((row[-1] == "–") == (row[0] == TABLES) for row in section.rows)
    early = [line for line in lines if line["run"]["label"] == SHUFFLED]
    assert STUDY.report(early).sections[0].rows == []  # before their tables have a result
    shuffled = next(line for line in lines if line["run"]["label"] == SHUFFLED)
    (again,) = train_run(runs[lines.index(shuffled)], corpus)
    assert again["curve"] == shuffled["result"]["curve"]
