"""Studies of pretraining: a seed repeats bit for bit, a grid that stopped goes on, a run is scored as it is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_engram.data import IGNORE_INDEX, PackedBatches
from torch_engram.studies import training
from torch_engram.studies.grid import all_results, read_log, run_grid
from torch_engram.studies.recipe import STUDY
from torch_engram.studies.report import write_report
from torch_engram.studies.study import report_of
from torch_engram.studies.training import TrainingRun, made_ready, settings_of, train_run
from torch_engram.train import Trainer, change
from torch_engram.train.evaluate import evaluate

RESULTS = Path(__file__).parents[2] / "docs" / "results"
TIMED = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def runs(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[TrainingRun]:
    cache = str(tmp_path_factory.mktemp("cache"))
    tiny = [TrainingRun(run.label, replace(run.recipe, cache=cache)) for run in STUDY.grid("tiny")]
    return made_ready(tiny, corpus, "cpu")


def result(run: TrainingRun, corpus: str) -> dict[str, Any]:
    (found,) = train_run(run, corpus)
    return {name: value for name, value in found.items() if name not in TIMED}


def test_a_seed_repeats_bit_for_bit_and_another_does_not(runs: list[TrainingRun], corpus: str) -> None:
    first, other = runs[:2]
    assert settings_of(first.recipe) | {"seed": 1} == settings_of(other.recipe) and first.recipe.seed == 0
    assert result(first, corpus) == result(first, corpus)
    assert result(first, corpus)["curve"] != result(other, corpus)["curve"]


def test_a_grid_that_stopped_equals_one_that_did_not(runs: list[TrainingRun], corpus: str, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"

    def do(run: TrainingRun) -> Any:
        return train_run(run, corpus)

    def known(lines: list[dict[str, Any]]) -> list[Any]:
        return [{**line["result"], **dict.fromkeys(TIMED)} for line in lines]

    run_grid(runs[1:3], do, stopped, study="recipe", scale="tiny", device="cpu")
    with open(stopped / "runs.jsonl", "ab") as log:
        log.write(b'{"run": {"cut')
    lines = run_grid(runs, do, stopped, study="recipe", scale="tiny", device="cpu")
    assert known(lines) == known(run_grid(runs, do, whole, study="recipe", scale="tiny", device="cpu"))
    assert len(lines) == len(runs) == len([line for line in read_log(stopped) if "result" in line])


def test_zero_rows_that_never_learn_change_no_loss(runs: list[TrainingRun], corpus: str, tmp_path: Path) -> None:
    frozen = change(runs[0].recipe, ["table.lr=0", "clip=0", f"data={corpus}", f"out={tmp_path}"])
    memory = Trainer(frozen)
    alone = Trainer(replace(frozen, model=replace(frozen.model, engrams={})))
    weights = memory.decoder.state_dict()
    alone.decoder.load_state_dict({name: weights[name] for name in alone.decoder.state_dict()})
    for _ in range(frozen.steps):
        (loss, _), (without, _) = memory.train_step(), alone.train_step()
        assert torch.equal(loss, without)
    assert training._scores(memory) == training._scores(alone)


def test_scores_are_of_the_whole_split_and_its_parts(runs: list[TrainingRun], corpus: str, tmp_path: Path) -> None:
    recipe = replace(runs[0].recipe, data=corpus, out=str(tmp_path))
    trainer = Trainer(recipe)
    for _ in range(recipe.steps):
        trainer.train_step()
    file = trainer.validation_file()
    assert file is not None
    whole = evaluate(trainer.decoder, trainer.banks, file, batch_size=3, seq_len=recipe.seq_len)
    scores = training._scores(trainer)
    share = scores["seen_share"]
    assert scores["validation"] == pytest.approx(whole.nats, rel=1e-5)
    assert scores["validation_tokens"] == whole.tokens and 0.1 < share < 0.9
    assert share * scores["seen"] + (1 - share) * scores["novel"] == pytest.approx(whole.nats, rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(whole.bits_per_byte, rel=1e-5)


def test_a_run_that_goes_astray_is_a_result(runs: list[TrainingRun], corpus: str, tmp_path: Path) -> None:
    wild = replace(
        runs[0],
        changed=("clip=0",),
        recipe=change(runs[0].recipe, ["rates.other=1e30", "rates.matrices=1e30", "clip=0"]),
    )
    lines = run_grid(
        [runs[0], wild], lambda run: train_run(run, corpus), tmp_path, study="recipe", scale="tiny", device="cpu"
    )
    assert lines[1]["result"]["validation"] is None and lines[1]["result"]["steps"] < wild.recipe.steps
    write_report(STUDY.report(lines), tmp_path)
    assert "| astray | – |" in (tmp_path / "recipe.md").read_text()


def test_a_last_step_that_leads_astray_is_one_too(
    runs: list[TrainingRun], corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_scores", lambda trainer: {"validation": float("nan"), "seen_share": 0.5})
    (found,) = train_run(runs[0], corpus)
    assert found["steps"] == 12 and found["validation"] is None is found["train"] is found["seen_share"]


def test_what_no_table_tells_apart_is_not_reported(runs: list[TrainingRun], corpus: str, tmp_path: Path) -> None:
    lines = run_grid(runs[:1], lambda run: train_run(run, corpus), tmp_path, study="recipe", scale="tiny", device="cpu")
    with pytest.raises(ValueError, match="have seed 0 and the same settings: report one grid"):
        STUDY.report([*lines, *lines])
    other = {**lines[0], "run": {**lines[0]["run"], "text": "another"}}
    with pytest.raises(ValueError, match="This log holds runs on 2 texts, which no table tells apart"):
        report_of("recipe")([*lines, other])
    changed = {**lines[0], "run": {**lines[0]["run"], "changed": ["table.lr=1"]}}
    (section,) = STUDY.report([changed]).sections
    assert section.rows == () and "No run of the base has ended" in section.words[0]


def test_a_text_of_which_nothing_can_be_held_out_is_refused_before_anything_is_trained(
    runs: list[TrainingRun], tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("one document of a king and his horse, and no other. " * 30)
    with (
        pytest.warns(UserWarning, match="is one document"),
        pytest.raises(ValueError, match="of 32 tokens is held out"),
    ):
        made_ready(runs[:1], str(text), "cpu")


def test_a_batch_is_filled_up_with_what_does_not_count(runs: list[TrainingRun], corpus: str) -> None:
    text = training._text(replace(runs[0].recipe, data=corpus))
    last = list(PackedBatches(text.files.train, 3, 32).in_order())[-1]
    whole = training._whole(last, 5)
    assert whole.tokens.shape == (5, 32) and (whole.targets[len(last.tokens) :] == IGNORE_INDEX).all()
    assert torch.equal(whole.targets[: len(last.tokens)], last.targets)


def test_committed_reports_are_the_logs(tmp_path: Path) -> None:
    folder = RESULTS / "recipe"
    write_report(STUDY.report(all_results(folder)), tmp_path)
    for name in ("recipe.csv", "recipe.md"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()} - {"runs.jsonl"}
