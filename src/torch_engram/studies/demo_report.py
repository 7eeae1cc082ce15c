"""The demo's page: what the three trained runs show, gathered for :mod:`torch_engram.analysis.report`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import torch

import torch_engram
from torch_engram.analysis.frequency import FrequencySplit, count_ngrams, loss_by_frequency
from torch_engram.analysis.gates import gate_map
from torch_engram.analysis.report import DemoReport, RunReport, render
from torch_engram.analysis.usage import ngram_sharing, table_usage
from torch_engram.data import PackedBatches
from torch_engram.data.tokenizers import end_token_id
from torch_engram.durable import write_json
from torch_engram.generate import generate
from torch_engram.studies.demo import LABELS, PROMPTS, SENTENCES, DemoRun
from torch_engram.train.metrics import read_metrics

_CONTINUATION_TOKENS = 32
_NUMBERS = ("name", "nats", "bits_per_byte", "total", "active", "tables", "tokens_per_second", "share_seen")


def write_report(report: DemoReport, folder: Path) -> Path:
    """Write ``results.json``, the table as numbers, and ``report.html``, whose path is returned."""
    write_json(folder / "results.json", [{name: getattr(run, name) for name in _NUMBERS} for run in report.runs])
    page = folder / "report.html"
    beside = page.with_suffix(".tmp")
    beside.write_text(render(report), encoding="utf-8")
    beside.replace(page)
    return page


def build_report(runs: Mapping[str, DemoRun]) -> DemoReport:
    """Everything that the page shows, from runs ``moe`` and ``engram`` and whatever else was trained."""
    engram = runs["engram"].trainer
    bank = engram.banks["engram"]
    seen = [engram.data.batch(step) for step in range(engram.step * engram.recipe.accumulation)]
    return DemoReport(
        title="torch-engram demo",
        lead=_lead(runs),
        runs=[_run(name, run) for name, run in runs.items()],
        gates=[gate_map(engram.decoder, engram.banks, engram.text.tokenizer, text) for text in SENTENCES],
        usage=table_usage(bank),
        sharing=ngram_sharing(bank.addressing, seen),
        frequency=_frequency(runs),
        facts=_facts(runs),
    )


def continuations(run: DemoRun) -> list[tuple[str, str]]:
    """Each prompt with a continuation, drawn at temperature 0.7."""
    tokenizer = run.trainer.text.tokenizer
    prompts = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]
    run.trainer.decoder.eval()
    written = generate(
        run.trainer.decoder,
        run.trainer.banks,
        prompts,
        max_new_tokens=_CONTINUATION_TOKENS,
        temperature=0.7,
        top_p=0.9,
        end_id=end_token_id(tokenizer),
    )
    return [(prompt, tokenizer.decode(tokens)) for prompt, tokens in zip(PROMPTS, written, strict=True)]


def _run(name: str, run: DemoRun) -> RunReport:
    score = run.outcome.score
    return RunReport(
        name=name,
        label=LABELS[name],
        metrics=read_metrics(run.trainer.folder),
        total=run.account.total,
        active=run.account.active,
        tables=run.account.tables,
        nats=score.nats if score is not None else None,
        bits_per_byte=score.bits_per_byte if score is not None else None,
        tokens_per_second=run.outcome.tokens_per_second,
        share_seen=run.trainer.share_seen,
        continuations=continuations(run),
    )


def _frequency(runs: Mapping[str, DemoRun]) -> list[FrequencySplit]:
    """Loss by how often the run had met an n-gram, with memory and without, on the same validation text."""
    trainer = runs["engram"].trainer
    file = trainer.validation_file()
    if file is None:
        return []
    seen = (trainer.data.batch(step) for step in range(trainer.step * trainer.recipe.accumulation))
    counts = count_ngrams(trainer.text.vocab, seen)
    models = {name: (runs[name].trainer.decoder, runs[name].trainer.banks) for name in ("moe", "engram")}
    held_out = PackedBatches(file, trainer.recipe.batch_size, trainer.recipe.seq_len).in_order()
    return loss_by_frequency(models, trainer.text.vocab, held_out, counts)


def _lead(runs: Mapping[str, DemoRun]) -> str:
    trainer = runs["engram"].trainer
    return (
        f"{len(runs)} decoders, each trained for {trainer.step} steps of {trainer.recipe.tokens_per_step:,} tokens: "
        "the same tokens in the same order. The mixture of experts and the one with Engram have the same total and the "
        f"same active parameters ({budget(runs)}); the memory is paid for with experts."
    )


def budget(runs: Mapping[str, DemoRun]) -> str:
    """How far the two budgets are apart."""
    moe, engram = runs["moe"].account, runs["engram"].account
    return (
        f"total {engram.total:,} to {moe.total:,}, {engram.total / moe.total - 1:+.2%}; "
        f"active {engram.active:,} to {moe.active:,}, {engram.active / moe.active - 1:+.2%}"
    )


def _facts(runs: Mapping[str, DemoRun]) -> list[tuple[str, str]]:
    trainer = runs["engram"].trainer
    model, moe = trainer.decoder.config, trainer.decoder.config.moe
    assert moe is not None
    engram = model.engrams["engram"]
    return [
        ("training text", f"{len(trainer.text.files.train):,} tokens, of which {trainer.share_seen:.1%} were seen"),
        ("decoder", f"{model.layers} layers, {model.hidden} wide, vocabulary {model.vocab_size:,}"),
        (
            "experts with Engram",
            f"{moe.experts} of width {moe.expert_hidden}, top {moe.top_k}, shared {moe.shared_hidden}",
        ),
        ("tables", f"{trainer.banks['engram'].rows:,} rows of {engram.row_dim} at layers {list(engram.layers)}"),
        ("canonical vocabulary", f"{trainer.text.vocab.raw_size:,} ids to {trainer.text.vocab.size:,}"),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}"),
        ("versions", f"torch-engram {torch_engram.__version__}, torch {torch.__version__}"),
    ]
