"""A resumed run is the uninterrupted one, bit for bit: weights, expert biases, optimisers, table bytes, metrics."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from torch_engram.train import open_checkpoint


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("stop", [1, 4])
def test_resume_continues_bit_for_bit(make_trainer, run_steps, state_of, assert_same, lines_of, prefetch, stop):
    whole = make_trainer(name="whole", table={"prefetch": prefetch})
    assert whole.decoder.config.moe is not None and whole.banks and whole.recipe.accumulation == 2
    whole.run()
    run_steps(make_trainer(table={"prefetch": prefetch}), stop)
    resumed = make_trainer(table={"prefetch": prefetch}, resume_run=True)
    assert resumed.step == stop
    outcome = resumed.run()
    assert outcome.step == 6 and not outcome.interrupted
    assert_same(state_of(resumed), state_of(whole))
    assert lines_of(resumed) == lines_of(whole)


def test_resume_with_rows_elsewhere_and_another_prefetch_changes_no_bit(make_trainer, run_steps, state_of, assert_same):
    whole = make_trainer(name="whole")
    whole.run()
    run_steps(make_trainer(table={"prefetch": 3}), 3)
    resumed = make_trainer(table={"prefetch": 1, "placement": "host", "cache": "2kB"}, resume_run=True)
    resumed.run()
    assert_same(state_of(resumed), state_of(whole))


@pytest.mark.parametrize("table", [
    {"optimizer": "rowwise_adam", "codec": "bf16"},
    {"optimizer": "adagrad"},
    {"optimizer": "sinkhorn", "codec": "bf16", "weight_decay": 5.0, "lazy_decay": True},
])  # fmt: skip
def test_resume_with_other_row_optimisers_and_bf16_rows(make_trainer, run_steps, state_of, assert_same, table):
    whole = make_trainer(name="whole", table=table)
    whole.run()
    run_steps(make_trainer(table=table), 2)
    resumed = make_trainer(table=table, resume_run=True)
    resumed.run()
    assert_same(state_of(resumed), state_of(whole))


def test_lines_after_the_checkpoint_are_dropped_and_written_anew(make_trainer, lines_of):
    """A run killed at step 5 with its last checkpoint at step 4 leaves a line too many, and perhaps half a line."""
    whole = make_trainer(name="whole")
    whole.run()
    killed = make_trainer(save_every=4)
    save = killed.save
    killed.save = lambda: save() if killed.step == 4 else None  # the process never came to its last save
    with pytest.raises(AttributeError):
        killed.run(lambda progress: None if progress.step < 6 else None.attribute)
    with open(killed.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in lines_of(killed)][-1] == 5
    resumed = make_trainer(resume_run=True)
    assert resumed.step == 4
    resumed.run()
    assert lines_of(resumed) == lines_of(whole)


def test_a_finished_run_can_be_extended(make_trainer, run_steps, state_of, assert_same):
    """With a constant rate, three steps and then three more are six steps."""
    constant = {"schedule": "linear", "floor": 1.0}
    whole = make_trainer(name="whole", **constant)
    whole.run()
    make_trainer(steps=3, **constant).run()
    longer = make_trainer(resume_run=True, **constant)
    longer.run()
    assert_same(state_of(longer), state_of(whole))


def test_resuming_a_finished_run_writes_nothing_new(make_trainer, state_of, assert_same):
    first = make_trainer()
    outcome = first.run()
    before = {path: path.stat().st_mtime_ns for path in outcome.checkpoint.rglob("*")}
    again = make_trainer(resume_run=True)
    assert again.run().checkpoint == outcome.checkpoint
    assert {path: path.stat().st_mtime_ns for path in outcome.checkpoint.rglob("*")} == before
    assert_same(state_of(again), state_of(first))


def test_starting_over_an_existing_run_is_refused(make_trainer):
    make_trainer().run()
    with pytest.raises(ValueError, match="already holds a run: pass --resume"):
        make_trainer()


def test_resuming_where_nothing_is_saved_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"no checkpoint in .* leave out --resume"):
        make_trainer(resume_run=True)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (dict(seq_len=8), "other data or batches"),
        (dict(batch_size=1), "other data or batches"),
        (dict(accumulation=1), "other data or batches"),
        (dict(seed=1), "another seed of initial rows"),
        (dict(table={"codec": "bf16"}), "trained with table.codec=fp32, not bf16: resume with --set table.codec=fp32"),
        (dict(table={"optimizer": "rowwise_adam"}), "table.optimizer=adam, not rowwise_adam"),
        (
            dict(rates={"matrices": 0.3}),
            r"rates.matrices=0\.\d+, not 0\.3: resume with .* or start anew under another name=",
        ),
        (dict(clip=0.5), r"clip=\d\.\d, not 0\.5"),
        (dict(dtype="bf16"), "dtype=fp32, not bf16"),
        (dict(fp8=True), "fp8=False, not True: resume with --set fp8=False"),
        (dict(schedule="step"), "schedule=.*, not step"),
        (dict(steps=1), "step-00000002 is past steps=1: resume with 2 or more"),
    ],
)
def test_resuming_something_else_is_refused_and_names_what_differs(make_trainer, changes, complaint):
    make_trainer(steps=2).run()
    with pytest.raises(ValueError, match=complaint):
        make_trainer(resume_run=True, **changes)


def test_what_does_not_change_the_run_may_change(make_trainer):
    make_trainer(steps=2).run()
    more = dict(steps=3, log_every=2, keep=5, table={"placement": "host", "prefetch": 2})
    assert make_trainer(resume_run=True, **more).run().step == 3


def test_what_an_older_checkpoint_does_not_name_had_its_default(make_trainer):
    facts = make_trainer(steps=2).run().checkpoint / "checkpoint.json"
    content = json.loads(facts.read_text())
    del content["recipe"]["fp8"]
    facts.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="fp8=False, not True"):
        make_trainer(resume_run=True, fp8=True)
    assert make_trainer(steps=3, resume_run=True).run().step == 3


def test_a_checkpoint_of_another_version_is_refused(make_trainer):
    facts = make_trainer(steps=2).run().checkpoint / "checkpoint.json"
    content = json.loads(facts.read_text())
    content["recipe"]["table"]["tomorrow"] = 1
    facts.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"another version of torch-engram .*'tomorrow'.* Resume with that version"):
        make_trainer(steps=3, resume_run=True)


def test_a_run_in_fp8_resumes_bit_for_bit(make_trainer, run_steps, state_of, assert_same):
    whole = make_trainer(name="whole", fp8=True)
    assert whole.decoder.fp8
    whole.run()
    run_steps(make_trainer(fp8=True), 3)
    resumed = make_trainer(fp8=True, resume_run=True)
    resumed.run()
    assert_same(state_of(resumed), state_of(whole))
    opened = open_checkpoint(resumed.folder).decoder  # nothing of it is in the weights
    assert not opened.fp8
    opened.fp8 = True


def test_resuming_with_another_model_is_refused(make_trainer, base_recipe):
    make_trainer(steps=1).run()
    with pytest.raises(ValueError, match="holds another model"):
        make_trainer(resume_run=True, model=replace(base_recipe.model, tie_embeddings=False))
