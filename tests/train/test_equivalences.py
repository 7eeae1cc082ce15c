"""Ways to run one recipe that must not change what is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch


def test_two_micro_batches_equal_one_of_twice_the_size(make_trainer, begin_uneven, state_of):
    """Up to rounding, without experts: their balance and their choices step on signs, which rounding may flip."""
    dense = replace(make_trainer().recipe.model, moe=None)
    two = make_trainer(name="two", model=dense)
    one = make_trainer(name="one", model=dense, batch_size=4, accumulation=1)
    assert begin_uneven(two) == begin_uneven(one)  # documents end in it, so that its halves weigh differently
    losses = [float(two.train_step()[0]), float(one.train_step()[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    left, right = state_of(two), state_of(one)
    assert sorted(left) == sorted(right)
    # One step: the orthogonalised update is computed in bf16, where an eps may become 2^-8 of an entry.
    for name in (name for name in left if name.startswith("weight")):
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-4, msg=name)
    for name in (name for name in left if name.startswith("optimizer")):
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-7, msg=name)
    for name, bank in two.banks.items():
        for table, other in zip(bank.tables, one.banks[name].tables, strict=True):
            mine = bank.source(table).format.decode(torch.arange(table.rows), left[f"table {name}.{table.space}"])
            its = bank.source(table).format.decode(torch.arange(table.rows), right[f"table {name}.{other.space}"])
            assert torch.equal(mine["count"], its["count"]) and mine["count"].sum() > 0
            torch.testing.assert_close(mine["mean"], its["mean"], rtol=1e-4, atol=1e-8)


def test_recompute_changes_no_bit(make_trainer, state_of, assert_same, lines_of):
    kept, again = make_trainer(name="kept"), make_trainer(name="again", recompute=True)
    assert again.decoder.recompute
    kept.run()
    again.run()
    assert_same(state_of(kept), state_of(again))
    assert lines_of(kept) == lines_of(again)


@pytest.mark.parametrize(
    "table",
    [
        {"prefetch": 1}, {"prefetch": 9}, {"placement": "host"}, {"placement": "host", "cache": "1MB"},
        {"placement": "disk"}, {"placement": "disk", "prefetch": 2},
        {"placement": "disk", "cache": "1MB", "prefetch": 1},
        {"placement": "host", "cache": "2kB", "prefetch": 3},  # one set, which throws rows out at every step
    ],
)  # fmt: skip
def test_prefetch_placement_and_cache_change_no_bit(make_trainer, state_of, assert_same, lines_of, table):
    plain, other = make_trainer(name="plain"), make_trainer(name="other", table=table)
    plain.run()
    other.run()
    assert_same(state_of(plain), state_of(other))
    assert lines_of(plain) == lines_of(other)
    counts = [line for bank in other.banks.values() for line in bank.cache_counts().values()]
    assert bool(counts) == ("cache" in table) and all(line["hits"] > 0 for line in counts)
    assert any(line["evictions"] + line["overflow"] for line in counts) == (table.get("cache") == "2kB")


def test_prefetch_really_runs_ahead_but_not_past_the_end(make_trainer):
    trainer = make_trainer(table={"prefetch": 3})
    ahead = []
    for _ in range(trainer.recipe.steps):
        trainer.train_step()
        ahead.append(len(trainer._ahead))
    assert ahead == [3, 3, 3, 2, 1, 0]


def test_the_data_of_every_step_is_that_of_its_number(make_trainer, run_steps):
    """Micro-batch m of step s is batch s * accumulation + m, whatever was prefetched, and after a resume too."""
    run_steps(make_trainer(table={"prefetch": 2}), 2)
    trainer = make_trainer(table={"prefetch": 2}, resume_run=True)
    for step in range(2, 6):
        prepared = trainer._next()
        for number, batch in enumerate(prepared.batches):
            assert torch.equal(batch.tokens, trainer.data.batch(step * 2 + number).tokens)


def test_two_memories_in_one_recipe_train_and_resume(make_trainer, run_steps, state_of, assert_same):
    base = make_trainer().recipe.model
    own = base.engrams["engram"]
    second = replace(own, layers=(0, 1), row_dim=(2, 6), seed=7, scheme="qwen_ple", fusion="qwen-ple")
    both = replace(base, engrams={"engram": own, "second": second})
    whole = make_trainer(name="whole", model=both, table={"prefetch": 1})
    assert sorted(whole.banks) == ["engram", "second"]
    before = state_of(whole)
    whole.run()
    after = state_of(whole)
    tables = [name for name in after if name.startswith("table")]
    assert {name.split(".")[0] for name in tables} == {"table engram", "table second"}
    assert not [name for name in tables if torch.equal(before[name], after[name])]
    run_steps(make_trainer(model=both), 3)
    resumed = make_trainer(model=both, resume_run=True)
    resumed.run()
    assert_same(state_of(resumed), after)


def test_a_recipe_without_memory_or_experts_trains(make_trainer):
    base = make_trainer().recipe.model
    outcome = make_trainer(model=replace(base, moe=None, engrams={})).run()
    assert outcome.step == 6 and outcome.score is not None


def test_bf16_trains_with_fp32_weights(make_trainer):
    trainer = make_trainer(dtype="bf16", steps=30, warmup=3, save_every=0)
    losses = []
    trainer.run(lambda progress: losses.append(progress.loss))
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    assert {parameter.dtype for parameter in trainer.decoder.parameters()} == {torch.float32}
    assert {bank.dtype for bank in trainer.banks.values()} == {torch.bfloat16}


def test_the_seed_decides_everything(make_trainer, state_of, assert_same):
    one, same, other = make_trainer(name="a"), make_trainer(name="b"), make_trainer(name="c", seed=1)
    for trainer in (one, same, other):
        trainer.train_step()
    assert_same(state_of(one), state_of(same))
    assert not torch.equal(state_of(one)["weight embedding.weight"], state_of(other)["weight embedding.weight"])
