"""Every mistake is one clear sentence on standard error that names the file or field and the mend; exit 1."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from torch_engram.data import train_bpe


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def refused(done, *needles: str) -> None:
    assert done.code == 1, done
    assert done.err.startswith("engram: ") and "Traceback" not in done.err, done.err
    assert done.err.endswith((".", "?", ")")), done.err
    for needle in needles:
        assert needle in done.err, (needle, done.err)


@pytest.fixture
def train(engram, tiny, corpus_file, tmp_path):
    def run(*settings: str, more: tuple[str, ...] = ()):
        return engram(
            "train", "tiny", *tiny, *sets(f"data={corpus_file}", f"out={tmp_path / 'runs'}", *settings), *more
        )

    return run


# -- the corpus -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b" \n\n \n"])
def test_an_empty_corpus(train, tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    refused(train(f"data={tmp_path / 'empty.txt'}"), "empty.txt", "holds no text; give a source")


def test_an_empty_folder(train, tmp_path):
    (tmp_path / "nothing").mkdir()
    refused(train(f"data={tmp_path / 'nothing'}"), "nothing", "holds no text")


@pytest.mark.parametrize("content", [b"\0\1\2" * 99, b"\xff\xfe\xfa" * 99, b"text " * 20_000 + b"\xff\xff"])
def test_a_binary_corpus(train, tmp_path, content):
    (tmp_path / "picture.txt").write_bytes(content)
    refused(train(f"data={tmp_path / 'picture.txt'}"), "picture.txt", "give")


def test_a_corpus_shorter_than_one_sequence(train, tmp_path):
    (tmp_path / "short.txt").write_text("a b\n\f\nc d")
    refused(train(f"data={tmp_path / 'short.txt'}"), "short.txt", "seq_len=16 needs 17", "longer corpus")


def test_a_corpus_that_is_not_there(train, tmp_path, corpus_file):
    (tmp_path / "stories.txt").write_text("x")
    refused(train(f"data={tmp_path / 'storys.txt'}"), "storys.txt", "did you mean", "stories.txt")


def test_a_share_that_is_none(train):
    refused(train("validation_share=1.5"), "validation_share is 1.5")


# -- recipes and settings -------------------------------------------------------------------------------------------


def test_an_unknown_recipe(engram):
    refused(engram("train", "tinny"), "There is no recipe 'tinny': did you mean 'tiny'?")


@pytest.mark.parametrize(
    ("setting", "needles"),
    [
        ("stpes=3", ("'stpes'", "did you mean 'steps'?")),
        ("model.engrams.engram.row_dims=3", ("did you mean 'model.engrams.engram.row_dim'?",)),
        ("steps=ten", ("steps is 'ten'", "a whole number")),
        ("model.heads=3", ("DecoderConfig.heads is 3", "must divide hidden (16)")),
        ("model.kv_heads=3", ("DecoderConfig.kv_heads is 3", "must divide heads (2)")),
        ("model.engrams.engram.layers=5", ("layer 5", "layers 0 to 1", "choose a layer that exists")),
        ("model.engrams.engram.layers=1,0", ("EngramConfig.layers", "ascending order")),
        ("model.vocab_size=100", ("vocab_size is 100; give at least 259",)),
        ("table.placement=disc", ("There is no placement 'disc'", "did you mean 'disk'?")),
        ("table.codec=fp31", ("There is no codec 'fp31'", "did you mean 'fp32'?")),
        ("tokenizer=/no/such.json", ("'/no/such.json'", "give the path of a `tokenizer.json`")),
        ("model.engrams.engram.rows_per_head=1", ("EngramConfig.rows_per_head is 1",)),
    ],
)
def test_a_setting_that_does_not_fit(train, setting, needles):
    refused(train(setting), *needles)


def test_a_preset_that_does_not_exist(engram):
    refused(engram("trace", "--preset", "deepseek-v4", "--text", "x"), "'deepseek-v4'", "did you mean 'deepseek-v4.1'?")


def test_a_gpu_that_is_not_there(train, engram, trained, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(train("device=cuda"), "device is 'cuda'", "sees no GPU here", "use device cpu")
    refused(engram("sample", trained, "--prompt", "a", "--device", "cuda"), "sees no GPU here")
    refused(
        engram("sample", trained, "--prompt", "a", "--device", "gpu"), "There is no device 'gpu': use 'cpu' or 'cuda'"
    )


def test_a_tracker_that_is_not_installed(train, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    refused(train("tracker=trackio"), "tracker=trackio needs the package 'trackio': pip install trackio")


def test_a_place_where_nothing_can_be_written(train, tmp_path):
    (tmp_path / "file").write_text("")
    done = train(f"out={tmp_path / 'file'}")
    refused(done, str(tmp_path / "file"))


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A run of one's own to spoil."""
    shutil.copytree(trained, tmp_path / "runs" / "tiny")
    return tmp_path / "runs" / "tiny"


def test_training_over_a_run_or_resuming_none(train, copy):
    refused(train(), f"{copy} already holds a run", "pass --resume")
    refused(train("name=other", more=("--resume",)), "no checkpoint", "leave out --resume")


def test_resuming_with_another_tokenizer(train, copy, tmp_path):
    other = tmp_path / "other.json"
    train_bpe(["the horse sees the river"] * 9, 262).save(str(other))
    refused(train(f"tokenizer={other}", more=("--resume",)), "step-00000004 was trained with another tokenizer")


def test_resuming_with_another_model_or_other_data(train, copy):
    refused(train("model.hidden=32", more=("--resume",)), "step-00000004 holds another model")
    refused(train("seq_len=8", more=("--resume",)), "step-00000004 was trained on other data or batches")


@pytest.mark.parametrize(
    "name", ["checkpoint.json", "model.safetensors", "tokenizer.json", "memory-engram/memory.json"]
)
def test_a_truncated_checkpoint(engram, train, copy, name):
    path = copy / "step-00000004" / name
    os.truncate(path, path.stat().st_size // 2)
    shown = str(path.parent if name.endswith("memory.json") else path)
    refused(engram("sample", copy, "--prompt", "the"), shown)
    refused(train(more=("--resume",)), shown)
    assert engram("sample", copy / "step-00000002", "--prompt", "the").code == 0  # the earlier one is still good


def test_a_swapped_tokenizer(engram, copy, tmp_path):
    train_bpe(["the horse sees the river"] * 9, 262).save(str(copy / "step-00000004" / "tokenizer.json"))
    refused(engram("sample", copy, "--prompt", "the"), "step-00000004/tokenizer.json")


def test_a_foreign_checkpoint(engram, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "pytorch_model.bin"):
        refused(engram("sample", path, "--prompt", "the"), f"no checkpoint in {path}", "give a run's folder")
    (tmp_path / "checkpoint.json").write_text("{}")
    refused(engram("sample", tmp_path, "--prompt", "the"), "checkpoint.json", "none of torch-engram's")


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (["--prompt", ""], "A prompt is empty: give at least one token"),
        (["--prompt", "a", "--temperature", "-1"], "temperature >= 0"),
        (["--prompt", "a", "--top-p", "2"], "0 < top_p <= 1"),
        (["--prompt", "a", "--tokens", "0"], "at least one new token"),
    ],
)
def test_sampling_settings_out_of_range(engram, trained, options, needle):
    refused(engram("sample", trained, *options), needle)


# -- through real processes -----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(engram_process, tiny, corpus_file, tmp_path):
    absurd = ("rates.matrices=1e38", "rates.embedding=1e38", "rates.other=1e38", "table.lr=1e38", "save_every=1")
    done = engram_process("train", "tiny", *tiny, *sets(f"data={corpus_file}", f"out={tmp_path}", "warmup=0", *absurd))
    refused(done, "The weights are not finite after step 1: lower the learning rates", "there is no good checkpoint")


def test_a_full_disk_while_saving(engram_process, engram, tiny, corpus_file, trained, tmp_path):
    """A limit on the size of files, set for the process, is a disk without room for the checkpoint's largest file."""
    run = tmp_path / "tiny"
    shutil.copytree(trained, run)
    largest = max(path.stat().st_size for path in (run / "step-00000004").rglob("*") if path.is_file())
    limit = ("prlimit", f"--fsize={largest - 1}") if shutil.which("prlimit") else None
    if limit is None:
        pytest.skip("no prlimit here")
    where = sets(f"data={corpus_file}", f"out={tmp_path}", "steps=6")
    done = engram_process("train", "tiny", *tiny, *where, "--resume", prefix=limit)
    refused(done, f"Cannot save {run / 'step-00000006'} (", "make room", f"{run / 'step-00000004'} is whole")
    assert sorted(path.name for path in run.glob("*step*")) == ["step-00000002", "step-00000004"]
    assert engram("train", "tiny", *tiny, *where, "--resume").code == 0  # with room again, the run goes on


def test_a_mistake_in_a_real_process(engram_process, tmp_path):
    refused(engram_process("train", "tiny", "--set", "device=cuda"), "PyTorch sees no GPU here")


def test_ids_that_no_tensor_holds(engram):
    done = engram("trace", "--preset", "deepseek-v4.1", "--canonical-ids", "99999999999999999999")
    refused(done, "--canonical-ids is '99999999999999999999': give whole numbers")


def test_a_preset_of_raw_ids_with_another_tokenizer(engram, trained):
    tokenizer = str(next(trained.glob("step-*")) / "tokenizer.json")
    done = engram("trace", "--preset", "qwen-ple", "--text", "hi", "--tokenizer", tokenizer)
    refused(done, "This tokenizer has 300 ids and the preset hashes 248320: give the tokenizer of its model")


def test_a_page_that_cannot_be_written(engram, trained, tmp_path):
    done = engram("gates", trained, "--text", "hi", "--html", tmp_path / "nowhere" / "page.html")
    refused(done, "nowhere/page.html", "check that path")


def test_a_memory_that_is_gone(engram, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    [newest] = sorted((tmp_path / "run").glob("step-*"))[-1:]
    shutil.rmtree(newest / "memory-engram")
    refused(engram("sample", newest, "--prompt", "a"), "memory-engram is damaged or missing: remove this checkpoint")


def test_a_checkpoint_that_is_not_finite(engram, trained, monkeypatch):
    from torch_engram import train

    def astray(path, device="cpu"):
        loaded = open_checkpoint(path, device)
        loaded.decoder.norm.weight.data.fill_(float("nan"))
        loaded.decoder.blocks[1].engrams["engram"].query_weight.data.fill_(float("nan"))
        return loaded

    open_checkpoint = train.open_checkpoint
    monkeypatch.setattr(train, "open_checkpoint", astray)
    refused(engram("sample", trained, "--prompt", "a"), "logits are not finite", "use an earlier checkpoint")
    refused(engram("gates", trained, "--text", "a horse"), "gates are not finite", "use an earlier checkpoint")
