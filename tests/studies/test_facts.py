"""Teaching facts on a tiny model: what is asked and scored, what a memory leaves alone, and whole runs of the study."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from torch_engram.data import IGNORE_INDEX, open_corpus, split_of
from torch_engram.stores import make_keys
from torch_engram.studies.facts import study
from torch_engram.studies.facts.other_text import (
    ELSEWHERE,
    REHEARSED,
    VALIDATION_SHARE,
    Rehearsal,
    to_rehearse,
    windows,
)
from torch_engram.studies.facts.prompts import Asked
from torch_engram.studies.facts.report import Row, by_seeds, cells, report, rows_of
from torch_engram.studies.facts.scoring import Exam, known_facts
from torch_engram.studies.facts.study import FULL, SMALL, FactsRun, facts_of, run_facts
from torch_engram.studies.facts.teaching import Lessons, teach
from torch_engram.studies.facts.ways import Rates, begin, lora_rank, read_by_a_token
from torch_engram.studies.facts.wordings import EXAMPLES, HELD_OUT, TRAINED
from torch_engram.studies.grid import run_grid
from torch_engram.studies.report import write_report

MEMORY = {"layers": (0, 1), "rows_per_head": 499, "heads": 2, "row_dim": 8, "conv_kernel": 0}
TINY = replace(SMALL, people=2, batch=4, pieces=4, piece=16, memory=MEMORY, asked=1, known=100, scored=1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({sign: number for number, sign in enumerate(["<pad>", *alphabet])}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>")


@pytest.fixture
def model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def lessons(model, tokenizer) -> Lessons:
    facts = Asked(facts_of(TINY), TRAINED, tokenizer)
    rehearsal = Rehearsal(model, to_rehearse(tokenizer, 4, 16), 0)
    return Lessons(facts, 4, rehearsal, rehearsed=0, weight=1.0, told_only=True, seed=0)


def taught_for(taught, lessons, exposures) -> None:
    for _ in teach(taught, lessons, (exposures,), lambda step, loss: None):
        pass


def stored(memory) -> torch.Tensor:
    memory.bank.flush()
    found = []
    for table in memory.bank.tables:
        source, keys = memory.bank.source(table), make_keys(table.space, torch.arange(table.rows))
        found.append(source.format.decode(keys, source.store.fetch(keys))["value"].flatten())
    return torch.cat(found)


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_no_held_out_wording_ends_as_a_trained_one():
    def ending(wording: str) -> tuple[str, ...]:
        return tuple(wording.replace("{}", "NAME").split()[-3:])

    for relation, wordings in HELD_OUT.items():
        ends = {ending(each) for each in TRAINED[relation]} | {ending(each)[1:] for each in TRAINED[relation]}
        assert not ends & {end for each in wordings for end in (ending(each), ending(each)[1:])}
        assert len(TRAINED[relation]) == 16 and all(each.count("{}") == 1 for each in (*wordings, *TRAINED[relation]))


def test_nobody_is_asked_for_who_is_an_example_or_whom_settings_were_chosen_on():
    for scale in (SMALL, FULL):
        facts = facts_of(scale)
        assert len(facts) == 3 * scale.people and not {fact.subject for fact in facts} & set(EXAMPLES)
    chosen_on = {fact.subject for fact in facts_of(replace(FULL, skipped=0, people=FULL.skipped))}
    for scale in (SMALL, FULL):
        assert not chosen_on & {fact.subject for fact in facts_of(scale)}


def test_what_was_known_is_asked_once_and_never_given_away():
    subjects = [fact.subject for fact in known_facts()]
    assert len(subjects) == len(set(subjects)) == 167 + 116 - 2 - 3
    assert not {"France", "hydrogen", "gold", "Georgia"} & set(subjects)


def test_prompts_know_the_subject_and_the_answer(tokenizer):
    facts = facts_of(TINY)
    for wordings in (TRAINED, HELD_OUT):
        asked = Asked(facts, wordings, tokenizer)
        for number, wording in asked.all():
            prompts, fact = asked.prompts([(number, wording)]), facts[number]
            text = wordings[fact.relation][wording].format(fact.subject) + " " + fact.answer
            assert tokenizer.decode(prompts.ids[0]) == text
            assert tokenizer.decode(prompts.ids[prompts.labels != IGNORE_INDEX]) == " " + fact.answer
            assert tokenizer.decode(prompts.ids[prompts.told]) == fact.subject[1:] + fact.answer


def test_a_batch_is_its_prompts_padded(tokenizer):
    asked = Asked(facts_of(TINY), TRAINED, tokenizer)
    chosen = asked.all(3)
    batch = asked.prompts(chosen)
    for row, one in enumerate(map(asked.prompts, ([each] for each in chosen))):
        length = one.ids.shape[1]
        assert batch.mask[row].sum() == length
        for name in ("ids", "labels", "told", "mask"):
            assert torch.equal(getattr(batch, name)[row, :length], getattr(one, name)[0]), name


def test_an_exposure_has_every_fact_once_and_wordings_take_turns(tokenizer):
    asked = Asked(facts_of(TINY), TRAINED, tokenizer)
    rounds = list(asked.exposures(16, seed=3))
    assert all(sorted(fact for fact, _ in each) == list(range(6)) for each in rounds)
    assert sorted(each for one in rounds for each in one) == sorted(asked.all())
    assert rounds == list(asked.exposures(16, seed=3)) != list(asked.exposures(16, seed=4))


def test_pieces_of_other_text_come_from_documents_of_their_split(tokenizer):
    documents = open_corpus(Path(str(files("torch_engram.data"))) / "corpus" / "english-plays.txt.xz")
    for split in ("train", "validation"):
        texts = [text for text in documents if split_of(text, VALIDATION_SHARE) == split]
        pieces = windows(tokenizer, "english-plays", 20, 64, split)
        assert pieces.shape == (20, 64) and len({tuple(piece) for piece in pieces.tolist()}) == 20
        assert all(any(tokenizer.decode(piece) in text for text in texts) for piece in pieces)
        assert torch.equal(pieces, windows(tokenizer, "english-plays", 20, 64, split))


def test_what_is_rehearsed_is_not_asked_and_the_other_way_round(tokenizer):
    rehearsed = {tokenizer.decode(piece) for piece in to_rehearse(tokenizer, 8, 64)}
    assert len(rehearsed) == 8 and not set(REHEARSED) & set(ELSEWHERE)
    for name in ELSEWHERE:
        documents = open_corpus(Path(str(files("torch_engram.data"))) / "corpus" / f"{name}.txt.xz")
        assert not any(piece in text for piece in rehearsed for text in documents)


# -- what is learned -------------------------------------------------------------------------------------------------


def test_a_model_that_was_drilled_is_right_and_one_that_was_not_is_wrong(model, tokenizer, lessons):
    exam = Exam(facts_of(TINY), tokenizer, most=None, every=100, pieces=1)
    assert sum(exam.score(model).trained.values()) == 0
    taught_for(begin("full", model, tokenizer, MEMORY, Rates(1e-2)), lessons, 200)
    assert min(exam.score(model).trained.values()) > 0.5


def test_a_memory_that_was_taught_nothing_changes_no_score(model, tokenizer):
    exam = Exam(facts_of(TINY), tokenizer, most=1, every=100, pieces=2)
    before = exam.score(model)
    taught = begin("memory", model, tokenizer, MEMORY, Rates(1e-2, 1e-1))
    assert exam.score(taught.model) == before


@pytest.mark.parametrize("told_only", [True, False])
def test_what_is_not_told_is_left_alone(model, tokenizer, lessons, told_only):
    """Signs that stand in wordings alone keep their logits bit for bit."""
    text = torch.tensor(tokenizer(["~? ~? ~? ~?"])["input_ids"])
    with torch.no_grad():
        before = model(text).logits
    taught = begin("memory", model, tokenizer, {**MEMORY, "rows_per_head": 200_003}, Rates(1e-2, 1e-1))
    taught_for(taught, replace(lessons, told_only=told_only), 4)
    name = torch.tensor(tokenizer(["of " + facts_of(TINY)[0].subject])["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(text).logits, before) is told_only
        with_memory = model(name).logits
        with taught.memory.disabled():
            assert not torch.equal(model(name).logits, with_memory)


def test_rows_outside_the_told_positions_get_no_gradient(model, tokenizer):
    taught = begin("memory", model, tokenizer, MEMORY, Rates(1e-2, 1e-1))
    ids = torch.tensor(tokenizer(["abcdefgh"])["input_ids"])
    taught.model.train()
    with taught.memory.only_at(torch.zeros_like(ids, dtype=torch.bool)):
        taught.model(ids, labels=ids).loss.backward()
    taught.optimizer.step()
    numbers = sum(weight.numel() for weight in taught.memory.engrams.parameters())
    assert taught.trained() == numbers
    taught.model(ids, labels=ids).loss.backward()
    taught.optimizer.step()
    assert taught.trained() > numbers


def test_other_text_teaches_a_memory_no_new_rows(model, tokenizer, lessons):
    taught = begin("memory", model, tokenizer, MEMORY, Rates(1e-2, 1e-1))
    taught_for(taught, lessons, 2)
    known, rows = taught.trained(), stored(taught.memory)
    ids = torch.tensor(tokenizer(["zzyzx " + facts_of(TINY)[0].subject])["input_ids"])
    with torch.no_grad():
        before = taught.model(ids).logits
    with taught.rehearsing():
        logits = taught.model(ids).logits
        logits.pow(2).mean().backward()
    assert torch.equal(logits, before)
    taught.optimizer.step()
    assert taught.trained() == known and not torch.equal(stored(taught.memory), rows)
    taught.optimizer.zero_grad()
    taught.model(ids).logits.pow(2).mean().backward()
    taught.optimizer.step()
    assert taught.trained() > known


def test_positions_are_as_many_as_the_tokens(model, tokenizer):
    memory = begin("memory", model, tokenizer, MEMORY, Rates(1e-2, 1e-1)).memory
    ids = torch.tensor(tokenizer(["abcdefgh"])["input_ids"])
    with memory.only_at(torch.ones(1, 3, dtype=torch.bool)), pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 8\)"):
        model(ids)
    model(ids)


def test_other_text_costs_nothing_while_nothing_is_said_otherwise(model, tokenizer):
    rehearsal = Rehearsal(model, to_rehearse(tokenizer, 4, 16), 0)
    assert rehearsal.loss(model, 3).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(50)
    assert rehearsal.loss(model, 3).item() > 1e-4


def test_rehearsed_text_is_kept_better_the_more_it_weighs(model, tokenizer, lessons):
    kept = []
    for pieces, weight in ((0, 1.0), (2, 1.0), (2, 10.0)):
        taught = begin("full", copy.deepcopy(model), tokenizer, MEMORY, Rates(1e-3))
        taught_for(taught, replace(lessons, rehearsed=pieces, weight=weight), 20)
        kept.append(lessons.rehearsal.loss(taught.model, 50).item())
    assert kept[1] < kept[0] / 2 and kept[2] < kept[1] / 1.5


def test_rehearsing_teaches_a_memory_no_new_rows(model, tokenizer, lessons):
    rows = []
    for pieces in (0, 2):
        taught = begin("memory", copy.deepcopy(model), tokenizer, MEMORY, Rates(1e-2, 1e-1))
        taught_for(taught, replace(lessons, rehearsed=pieces), 4)
        rows.append(stored(taught.memory))
    assert torch.equal(rows[0] != 0, rows[1] != 0) and not torch.equal(*rows)


def test_a_token_reads_as_much_of_lora_as_of_the_memory(model, tokenizer):
    rates = Rates(1e-3, 1e-2)
    memory = begin("memory", model, tokenizer, MEMORY, rates)
    assert memory.read == read_by_a_token(memory.memory.bank.config)
    memory.memory.detach()
    rank = lora_rank(model, memory.read)
    lora = begin("lora", model, tokenizer, MEMORY, rates)
    assert abs(lora.read - memory.read) <= lora.read / rank / 2


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_a_study_from_its_runs_to_its_report(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_smollm2", lambda: (model, tokenizer))
    memory = FactsRun("memory", TINY, Rates(1e-2, 1e-1), (1, 2), 1)
    runs = [
        FactsRun("untaught", TINY, Rates(0.0)), memory, replace(memory, told_only=False, rehearsed=0),
        FactsRun("lora", TINY, Rates(1e-3), (1, 2), 1), FactsRun("full", TINY, Rates(1e-3), (1, 2), 1),
    ]  # fmt: skip
    steps: list[int] = []

    def do(run):
        return run_facts(run, "cpu", lambda step, loss: steps.append(step))

    results = run_grid(runs, do, tmp_path, study="facts", scale="small", device="cpu")
    rows = rows_of(results)
    assert [(row.way, row.exposures) for row in rows] == [
        ("before", 0), ("memory", 1), ("memory", 2),
        ("memory, no other text, taught at every token", 1), ("memory, no other text, taught at every token", 2),
        ("LoRA", 1), ("LoRA", 2), ("full", 1), ("full", 2),
    ]  # fmt: skip
    assert steps == [step for run in runs for step in range(1, run.steps + 1)]
    assert all(row.read and row.trained and row.seconds for row in rows[1:])
    write_report(report(results), tmp_path)
    with open(tmp_path / "facts.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["elsewhere"]) for line in lines] == [row.elsewhere for row in rows]
    assert all(line["device"] and line["versions"] and line["code"] and line["date"] for line in lines)
    assert "<svg" in (tmp_path / "facts.svg").read_text()
    table = (tmp_path / "facts.md").read_text()
    assert table.count("| memory |") == 2 and rows[0].device in table


def line(way: str, seed: int = 0, exposures: tuple[int, ...] = (1,), **fields) -> dict:
    run = FactsRun(way, TINY, Rates(**{"weights": 1e-3, **fields.pop("rates", {})}), exposures, 2, seed=seed, **fields)
    result = {"exposures": exposures[-1], "trained": {"born": 0.5}, "held_out": {"born": 0.25}}
    result |= {"known": {"capital": 0.5, "symbol": 0.5}, "other_text": dict.fromkeys((*REHEARSED, *ELSEWHERE), 1.0)}
    where = {"device": "cpu", "versions": "1", "code": "a", "date": "today"}
    return {"run": json.loads(json.dumps(asdict(run))), "result": result, **where}


def test_runs_that_differ_in_more_than_their_seed_are_told_apart():
    rows = rows_of([
        line("memory", seed=1), line("memory", exposures=(1, 4)), line("memory", seed=2, exposures=(4,)),
        line("memory", rates={"rows": 0.3}), line("memory", told_only=False), line("lora", rates={"weights": 3e-3}),
        line("lora", exposures=(1, 4)),
    ])  # fmt: skip
    assert [(group[0].way, group[0].exposures, len(group)) for group in by_seeds(rows)] == [
        ("memory", 1, 1), ("memory", 4, 2), ("memory, rows' rate 0.3", 1, 1),
        ("memory, taught at every token", 1, 1), ("LoRA, rate 0.003", 1, 1), ("LoRA", 4, 1),
    ]  # fmt: skip


def test_seeds_are_lines_of_their_own_in_the_log_and_one_in_the_table():
    row = Row("memory", 16, 0, 0.98, 0.9, 0.3, 0.5, 20.0, 40.0, 4 << 20, 8 << 20, 10.0, "cpu", "1", "a", "today")
    rows = [row, replace(row, seed=1, recall=1.0, elsewhere=41.0), replace(row, exposures=64)]
    both, alone = map(cells, by_seeds(rows))
    assert both[:4] == ("memory", "16", "99.0 ±1.0", "90.0 ±0.0") and both[7:] == ("40.50 ±0.50", "4.0", "8.0", "10")
    assert alone[:4] == ("memory", "64", "98.0", "90.0")


def test_a_report_needs_the_untaught_model_and_says_where_all_comes_from():
    with pytest.raises(ValueError, match="no result of the untaught model: run the study again"):
        report([line("memory")])
    lines = [line("untaught"), line("memory"), {**line("full"), "code": "b"}]
    assert report(lines).origins == ["cpu; 1; a; today", "cpu; 1; b; today"]


def test_a_seed_repeats_bit_for_bit(model, tokenizer, monkeypatch):
    monkeypatch.setattr(study, "_smollm2", lambda: (model, tokenizer))
    run = FactsRun("memory", TINY, Rates(1e-2, 1e-1), (1,), 1)
    first, second = ([{**each, "seconds": 0} for each in run_facts(run, "cpu")] for _ in range(2))
    assert first == second
