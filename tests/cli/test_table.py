"""``engram table``: what files hold, and which of them are damaged, of foreign shards and of saved memories."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torch_engram.memory import open_bank, save_bank


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


@pytest.fixture
def shards(tmp_path):
    """DeepSeek-V4.1's two tables and a shard of Qwen4Exp's, as their checkpoints name them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, layer in enumerate((1, 14)):
        name = f"layers.{layer}.engram.embed"
        weight = torch.randint(256, (1000, 256), dtype=torch.uint8).view(torch.float8_e4m3fn)
        scale = torch.randint(100, 130, (1000, 8), dtype=torch.uint8).view(torch.float8_e8m0fnu)
        save_file({f"{name}.weight": weight, f"{name}.scale": scale}, folder / f"model-{number}.safetensors")
    prefix = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding.shard_"
    save_file({f"{prefix}{n}.weight": torch.ones(50, 160).bfloat16() for n in range(4)}, folder / "q.safetensors")
    return folder


@pytest.fixture
def bank(make_bank):
    return make_bank({"row_dim": (3, 5)}, codec="bf16")


@pytest.fixture
def memory(tmp_path, bank):
    save_bank(bank, tmp_path / "memory")
    return tmp_path / "memory"


def test_info_knows_tables_by_name(engram, shards):
    done = engram("table", "info", shards)
    assert done.code == 0, done
    for line in (
        "layers.1.engram.embed.weight DeepSeek-V4.1 1 1,000 256 fp8 264.0 kB 1",
        "ngram_embedding.shard_*.weight Qwen4Exp 1 200 160 bf16 64.0 kB 1",
        "layers.14.engram.embed.weight DeepSeek-V4.1 14 1,000 256 fp8 264.0 kB 1",
    ):
        assert line in done.out, done.out


def test_info_of_one_file_and_of_a_memory(engram, shards, memory, bank):
    assert engram("table", "info", shards / "model-1.safetensors").out.count("DeepSeek") == 1
    out = engram("table", "info", memory).out
    for table in bank.tables:
        assert f"engram (count) torch-engram {table.layer} {table.rows} {table.dim} bf16" in out, out


def test_verify_says_what_it_cannot_know_saves_sums_and_names_the_damaged_shard(engram, shards):
    done = engram("table", "verify", shards)
    assert done.code == 0 and done.out.count("read ") == 3 and "see --save" in done.out
    done = engram("table", "verify", shards, "--save")
    assert done.code == 0 and "SHA256SUMS" in done.out
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=shards, check=True)
    done = engram("table", "verify", shards)
    assert done.code == 0 and done.out.count("whole ") == 3
    flip(shards / "model-1.safetensors")
    for options in ((), ("--save",)):  # what is damaged is not declared whole
        done = engram("table", "verify", shards, *options)
        assert done.code == 1 and "1 of 3 files are not whole: fetch" in done.err and "model-1.safetensors" in done.err
        assert done.out.count("whole ") == 2 and done.out.count("damaged ") == 1
    assert engram("table", "verify", shards / "model-0.safetensors").code == 0


def test_sums_are_those_of_sha256sum_and_other_lines_stay(engram, shards):
    sums = subprocess.run(
        ["sha256sum", "-b", "./model-0.safetensors"], cwd=shards, capture_output=True, check=True
    ).stdout
    others = f"# ours\n{'0' * 64}  tokenizer.json\n\\{'1' * 64}  a\\\\b\n"
    (shards / "SHA256SUMS").write_text(
        sums.decode().upper().replace("./MODEL-0.SAFETENSORS", "./model-0.safetensors") + others
    )
    (shards / "two\nlines [v1].safetensors").write_bytes((shards / "q.safetensors").read_bytes())
    (shards / "q.safetensors").unlink()
    done = engram("table", "verify", shards, "--save")
    assert done.code == 0 and done.out.count("whole ") == 1 and done.out.count("read ") == 2 and "[v1]" in done.out
    assert others in (shards / "SHA256SUMS").read_text()
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=shards, capture_output=True, text=True)
    assert done.stdout.count(": OK") == 3
    assert engram("table", "verify", shards).out.count("whole ") == 3
    flip(shards / "model-0.safetensors")
    assert engram("table", "verify", shards).code == 1
    (shards / "SHA256SUMS").write_text("no sums\n")
    done = engram("table", "verify", shards)
    assert done.code == 1 and "SHA256SUMS, line 1" in done.err


def test_a_shard_that_has_a_checksum_and_is_gone_is_missing(engram, shards):
    engram("table", "verify", shards, "--save")
    (shards / "model-1.safetensors").unlink()
    done = engram("table", "verify", shards)
    assert done.code == 1 and done.out.count("missing ") == 1 and "model-1.safetensors" in done.err


def test_verify_of_a_memory(engram, memory):
    done = engram("table", "verify", memory)
    assert done.code == 0 and done.out.count("whole ") == 4
    one, two, *_ = sorted(memory.glob("table-*/*.safetensors"))
    flip(one)
    two.unlink()
    done = engram("table", "verify", memory)
    assert done.code == 1 and "2 of 4 files are not whole" in done.err and one.name in done.err and two.name in done.err
    assert engram("table", "verify", memory, "--save").err.startswith("engram: ")


@pytest.mark.parametrize(
    "damage", ["no vocabulary", "another vocabulary", "fewer tables", "fewer rows", "no configuration"]
)
def test_a_memory_that_cannot_be_opened_is_not_whole(engram, memory, damage):
    facts = json.loads((memory / "memory.json").read_text())
    (vocab,) = memory.glob("canonical-*")
    if damage == "no vocabulary":
        vocab.unlink()
    elif damage == "another vocabulary":
        vocab.write_bytes(b"x")
    elif damage == "fewer tables":
        del facts["tables"][1:]
    elif damage == "fewer rows":
        facts["tables"][0] = {**facts["tables"][0], "rows": 0, "parts": []}
    else:
        facts["config"] = 7
    (memory / "memory.json").write_text(json.dumps(facts))
    done = engram("table", "verify", memory)
    assert done.code == 1 and "use an intact copy" in done.err and "Traceback" not in done.err, done
    with pytest.raises(ValueError, match=r"intact copy|0 rows where"):
        open_bank(memory)


@pytest.mark.parametrize("verb", ["info", "verify"])
def test_what_is_no_table_is_refused(engram, tmp_path, verb):
    for path, needle in ((tmp_path / "gone", "is no file"), (tmp_path, "has no .safetensors file")):
        done = engram("table", verb, path)
        assert done.code == 1 and needle in done.err and "Traceback" not in done.err
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 64)
    done = engram("table", verb, tmp_path)
    assert done.code == 1 and "x.safetensors is no whole safetensors file" in done.err
    save_file({}, tmp_path / "x.safetensors")
    for path in (tmp_path, tmp_path / "x.safetensors"):
        assert f"{path} has no tensor" in engram("table", verb, path).err
    save_file({"bias": torch.ones(3)}, tmp_path / "x.safetensors")
    done = engram("table", "info", tmp_path)
    assert done.code == 1 and "no matrix that could be a table" in done.err


def test_synth_makes_what_info_shows(engram, tmp_path):
    done = engram("table", "synth", tmp_path / "t", "--rows", "1000", "--layout", "qwen4exp", "--shards", "4")
    assert done.code == 0 and "1,000 rows of 160 numbers in bf16" in done.out
    assert "Qwen4Exp 1 1,000 160 bf16 320.0 kB 4" in engram("table", "info", tmp_path / "t").out
    assert engram("table", "verify", tmp_path / "t").code == 0
    for options, needle in {
        ("--layout", "qwen"): "no layout 'qwen': did you mean 'qwen4exp'",
        ("--codec", "fp9"): "no codec 'fp9'",
        (): "is there already",
    }.items():
        done = engram("table", "synth", tmp_path / "t", "--rows", "9", *options)
        assert done.code == 1 and needle in done.err, done
