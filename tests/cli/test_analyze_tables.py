"""``engram analyze collisions`` and ``usage``: on tables of several sizes, a preset and a trained run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from torch_engram.analysis import distinct_ngrams, ngram_sharing, table_collisions, table_usage
from torch_engram.analysis.page import percent
from torch_engram.data import Batch, open_corpus, tokenize_corpus
from torch_engram.train import open_checkpoint
from torch_engram.train.checkpoint import latest_checkpoint


def tokens_of(corpus_file, tokenizer, folder):
    """The tokens of a text, and where its documents start."""
    file = tokenize_corpus(open_corpus(corpus_file), tokenizer, folder, validation_share=0.0).train
    return np.array(file.tokens), np.array(file.starts)


def test_a_run_on_a_text(engram, trained, corpus_file, tmp_path):
    loaded = open_checkpoint(trained)
    addressing = loaded.banks["engram"].addressing
    tokens, starts = tokens_of(corpus_file, loaded.tokenizer, tmp_path)
    expected = table_collisions(addressing, distinct_ngrams(addressing, tokens, starts))
    command = ("analyze", "collisions", "--checkpoint", trained, "--text", corpus_file)
    shown = json.loads(engram(*command, "--json").out)
    assert shown["text"] == str(corpus_file) and shown["tokens"] == len(tokens)
    assert [(one["memory"], one["layer"], one["order"]) for one in shown["tables"]] == [
        ("engram", one.layer, one.order) for one in expected
    ]
    for found, one in zip(shown["tables"], expected, strict=True):
        assert found["ngrams"] == one.ngrams and found["positions"] == one.positions
        assert found["in_every_head"] == one.in_every_head
        assert [head["rows"] for head in found["heads"]] == [head.rows for head in one.heads]
        assert [head["collided"] for head in found["heads"]] == [head.collided for head in one.heads]
    people = engram(*command).out
    assert f"{len(tokens):,} tokens" in people
    for one in expected:
        (first, second) = one.heads
        rows = (first.rows + second.rows) / 2
        collided, uniform, positions, dominance = (
            percent((getattr(first, name) + getattr(second, name)) / 2)
            for name in ("collided", "expected_collided", "collided_positions", "dominance")
        )
        line = f"engram {one.layer} {one.order} 2 {rows:,.0f} {one.ngrams:,} {one.ngrams / rows:.3g} "
        line += f"{collided} {uniform} {positions} {percent(one.in_every_head)} {percent(one.expected_in_every_head)}"
        assert line in people, people
        assert dominance in people


def test_sizes_side_by_side_on_the_first_tokens(engram, trained, corpus_file):
    tokenizer = latest_checkpoint(trained) / "tokenizer.json"
    sizes, shape = ("--rows", "50", "--rows", "700"), ("--heads", "3", "--max-ngram", "4")
    command = ("analyze", "collisions", *sizes, *shape, "--tokenizer", tokenizer, "--text", corpus_file)
    shown = json.loads(engram(*command, "--tokens", "400", "--json").out)
    assert shown["tokens"] == 400
    tables = shown["tables"]
    assert [(one["memory"], one["order"]) for one in tables] == [
        (size, order) for size in ("50 rows", "700 rows") for order in (2, 3, 4)
    ]
    assert all(one["positions"] == 400 and len(one["heads"]) == 3 for one in tables)
    for small, large in zip(tables[:3], tables[3:], strict=True):
        assert small["ngrams"] == large["ngrams"]
        assert min(head["collided"] for head in small["heads"]) > max(head["collided"] for head in large["heads"])
    assert [head["rows"] for head in tables[0]["heads"]] == [53, 59, 61] and tables[3]["heads"][0]["rows"] == 701


def test_a_tokenizer_is_trained_where_none_is_given(engram, corpus_file):
    done = engram("analyze", "collisions", "--rows", "90", "--text", corpus_file)
    assert done.code == 0 and "90 rows 0 2 8 " in done.out and "90 rows 0 3 8 " in done.out, done


def test_a_preset_with_its_tokenizer(engram, corpus_file, tokenizer_files):
    command = ("analyze", "collisions", "--preset", "deepseek-v4.1", "--text", corpus_file, "--tokens", "300")
    done = engram(*command, "--tokenizer", tokenizer_files["deepseek-v4"], "--json")
    tables = json.loads(done.out)["tables"]
    assert [(one["layer"], one["order"]) for one in tables] == [
        (layer, order) for layer in (1, 14) for order in (2, 3, 4)
    ]
    assert all(len(one["heads"]) == 8 and one["heads"][0]["collided"] < 0.01 for one in tables)
    done = engram(*command, "--tokenizer", tokenizer_files["deepseek-v3"])
    assert done.code == 1 and "use the tokenizer that the memory was made with" in done.err


@pytest.mark.parametrize(("options", "needle"), [
    ((), "give one of --preset, --checkpoint and --rows"),
    (("--preset", "demo", "--rows", "50"), "give one of --preset, --checkpoint and --rows"),
    (("--preset", "dmo", "--tokenizer", "x"), "did you mean 'demo'"),
    (("--preset", "demo"), "needs the tokenizer that the preset is for: give --tokenizer"),
    (("--preset", "demo", "--tokenizer", "x", "--heads", "2"), "leave out --heads and --max-ngram"),
    (("--checkpoint", "nowhere"), "nowhere"),
    (("--checkpoint", "nowhere", "--tokenizer", "x"), "leave out --tokenizer"),
    (("--rows", "50", "--tokenizer", "gone.json"), "gone.json"),
])  # fmt: skip
def test_mistakes_are_sentences(engram, corpus_file, options, needle):
    done = engram("analyze", "collisions", "--text", corpus_file, *options)
    assert done.code == 1 and needle in done.err and "Traceback" not in done.err, done


def test_use_of_the_rows(engram, trained):
    (used,) = table_usage(open_checkpoint(trained).banks["engram"])
    shown = json.loads(engram("analyze", "usage", trained, "--json").out)
    assert shown["sharing"] is None
    (table,) = shown["tables"]
    assert tuple(table["histogram"]) == used.histogram and table["updated"] == used.updated > 0
    people = engram("analyze", "usage", trained).out
    assert f"engram, layer {used.layer}, orders 2, 3: {used.updated:,} of {used.rows:,} rows updated" in people
    largest = max(used.histogram)
    for number, rows in enumerate(used.histogram):
        label = ("0", "1", "2–3", "4–7")[number]
        line = f"{label} {rows:,} {percent(rows / used.rows)} {'█' * round(40 * rows / largest)}"
        assert line.rstrip() in people, people
    assert "█" * 40 in people and "most" not in people


def test_ngrams_of_a_text_that_share_a_row(engram, trained, corpus_file, tmp_path):
    loaded = open_checkpoint(trained)
    tokens, starts = tokens_of(corpus_file, loaded.tokenizer, tmp_path)
    doc_start = torch.zeros(1, len(tokens), dtype=torch.bool)
    doc_start[0, torch.from_numpy(starts)] = True
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    expected = ngram_sharing(loaded.banks["engram"].addressing, [Batch(ids, ids, doc_start)])
    command = ("analyze", "usage", trained, "--text", corpus_file)
    shown = json.loads(engram(*command, "--json").out)["sharing"]
    assert [(one["order"], one["ngrams"], one["reached"], one["largest"], one["mean"]) for one in shown] == [
        (one.order, one.ngrams, one.reached, one.largest, one.mean) for one in expected
    ]
    people = engram(*command).out
    for one in expected:
        assert f"engram {one.layer} {one.order} {one.ngrams:,} 2 {one.rows:,} " in people
        assert f" {one.mean:.2f} {one.largest:,}" in people
