"""``engram train`` and ``engram sample`` as a user runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from torch_engram.generate import generate
from torch_engram.train import open_checkpoint
from torch_engram.train.checkpoint import checkpoints

ENGRAM = Path(sys.executable).with_name("engram")


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def test_training_tells_the_score_and_where_the_checkpoint_is(engram, tiny, corpus_file, tmp_path):
    done = engram("train", "tiny", *tiny, *sets(f"data={corpus_file}", f"out={tmp_path}"))
    assert done.code == 0 and done.err == ""
    [*_, newest] = checkpoints(tmp_path / "tiny")
    assert re.search(r"Parameters: total \d\.\d+ M, active \d\.\d+ M, tables 0\.\d+ M", done.out)
    assert f"Saved {newest}; " in done.out and "of the training text seen." in done.out
    last = json.loads((tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"Validation: {last['validation']:.4f} nats/token, {last['bits_per_byte']:.4f} bits/byte over" in done.out


def test_a_run_goes_on_with_resume(engram, tiny, corpus_file, tmp_path):
    where = sets(f"data={corpus_file}", f"out={tmp_path}")
    assert engram("train", "tiny", *tiny, *where).code == 0
    done = engram("train", "tiny", *tiny, *where, *sets("steps=6"), "--resume")
    assert done.code == 0 and "step-00000006" in done.out
    steps = [json.loads(line)["step"] for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 6]  # 4 and 6 with their validations


def test_a_folder_and_a_saved_dataset_are_corpora_too(engram, tiny, corpus_file, tmp_path):
    import datasets

    documents = corpus_file.read_text().split("\n\f\n")
    (tmp_path / "folder").mkdir()
    for number, document in enumerate(documents):
        (tmp_path / "folder" / f"{number:02}.md").write_text(document)
    datasets.Dataset.from_dict({"story": documents}).save_to_disk(tmp_path / "set")
    for name, more in (("folder", []), ("set", ["text_field=story"])):
        where = sets(f"data={tmp_path / name}", f"out={tmp_path / 'runs'}", f"name={name}", "steps=1", *more)
        done = engram("train", "tiny", *tiny, *where)
        assert done.code == 0, done
        assert len(checkpoints(tmp_path / "runs" / name)) == 1
    # The same documents in the same order: the same tokens, from the same tokenizer, so the same checkpoint.
    facts = [
        json.loads((tmp_path / f"runs/{name}/step-00000001/checkpoint.json").read_text()) for name in ("folder", "set")
    ]
    assert facts[0]["sha256"] == facts[1]["sha256"]


def test_files_that_are_not_text_are_told_in_one_line(engram_process, tiny, corpus_file, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "all.txt").write_text(corpus_file.read_text())
    (tmp_path / "folder" / "image.png").write_bytes(b"\0\1")
    done = engram_process("train", "tiny", *tiny, *sets(f"data={tmp_path / 'folder'}", f"out={tmp_path}", "steps=1"))
    assert done.code == 0
    assert (
        done.err == f"engram: Skipped 1 files of '{tmp_path}/folder' that are not text, as {tmp_path}/folder/image.png."
    )


def test_the_demo_compares_and_reports(engram, corpus_file, tmp_path):
    settings = sets(f"data={corpus_file}", "model.vocab_size=300", "steps=2", "warmup=1", "seq_len=16", "batch_size=2",
                    "validation_share=0.2", "dtype=bf16")  # fmt: skip
    done = engram("demo", "--out", tmp_path / "demo", *settings)
    assert done.code == 0, done
    results = {run["name"]: run for run in json.loads((tmp_path / "demo" / "results.json").read_text())}
    for name, label in (("dense", "dense"), ("moe", "MoE"), ("engram", "MoE + Engram")):
        assert re.search(rf"│ {re.escape(label)} +│ {results[name]['nats']:.4f} │", done.out), done.out
    assert re.search(r"MoE \+ Engram against MoE: total .*%.*active .*%", done.out), done.out
    assert done.out.endswith(f"Report: {tmp_path / 'demo' / 'report.html'}") and "of the training text seen" in done.out
    assert (tmp_path / "demo" / "report.html").stat().st_size > 20_000


def test_a_plain_text_file_trains_as_it_is(engram, tmp_path):
    """At the defaults: no separators, no blank lines, a few kilobytes."""
    text = "".join(
        f"The {noun} number {i} sees the river and the king.\n" for i in range(300) for noun in ("horse", "ship")
    )
    (tmp_path / "my_text.txt").write_text(text)
    settings = sets(
        f"data={tmp_path / 'my_text.txt'}", f"out={tmp_path / 'runs'}", "steps=2", "model.vocab_size=300", "seq_len=32"
    )
    done = engram("train", "tiny", *settings)
    assert done.code == 0 and "Validation: " in done.out, done


def test_what_is_sampled_is_not_broken_at_the_terminals_edge(trained):
    prompt = "the horse sees the river " * 8
    command = [ENGRAM, "sample", trained, "--prompt", prompt, "--tokens", "1", "--temperature", "0"]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "40"}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(prompt) and len(done.stdout) > len(prompt) + 2


def test_sampling_continues_every_prompt(engram, trained):
    prompts = ["the horse", "the king finds", "a"]
    done = engram("sample", trained, *(p for prompt in prompts for p in ("--prompt", prompt)), "--temperature", "0",
                  "--tokens", "6")  # fmt: skip
    assert done.code == 0
    loaded = open_checkpoint(trained)
    ids = [loaded.tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    for prompt, one in zip(prompts, ids, strict=True):
        [alone] = generate(loaded.decoder, loaded.banks, [one], max_new_tokens=6, end_id=0)
        assert " ".join((prompt + loaded.tokenizer.decode(alone)).split()) in done.out


def test_a_process_samples_what_this_one_does(engram, engram_process, trained):
    arguments = ("sample", trained, "--prompt", "the river", "--seed", "3", "--tokens", "8")
    one, other = engram(*arguments), engram_process(*arguments)
    assert one == other and one.code == 0 and one.out.startswith("the river")
    assert engram(*arguments[:-3], "4", *arguments[-2:]).out != one.out
