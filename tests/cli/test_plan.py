"""``engram plan``: a placement for this machine or another, on a text or on the curves that ship."""

from __future__ import annotations

import json
import os

import pytest
import torch

from torch_engram.bench import limits, rates

MACHINE = ("--hbm", "80GB", "--ram", "256GB", "--disk")


def test_another_machine_by_a_real_process(engram_process):
    done = engram_process("plan", "--preset", "deepseek-v4.1", *MACHINE)
    assert done.code == 0, done
    for part in (
        "tables of 202.8 GB; a token reads 48 rows of 264 bytes, 12,672 bytes",
        "device does not fit: tables of 202.8 GB in 80 GB of GPU memory",
        "host fits: tables of 202.8 GB in 256 GB of RAM; a cache of 8 GB in 80 GB of GPU memory",
        "disk fits: tables of 202.8 GB on a disk that has room; a cache of 8 GB in 80 GB of GPU memory",
        "Place the tables on the host", "Given: GPU memory 80 GB, RAM 256 GB, disk that has room",
        "As measured on an H100 with PCIe 5 x16: bus 54.9 GB/s,", "For the rates of this machine, add --measure.",
        "M tokens of English documentation and code",
    ):  # fmt: skip
        assert part in done.out, done.out


def test_json_has_every_input_and_follows_from_them(engram):
    done = engram("plan", "--preset", "qwen-ple", *MACHINE, "--bus", "10", "--disk-latency", "50", "--json")
    shown = json.loads(done.out)
    inputs = shown["inputs"]
    assert inputs["machine"]["bus"] == 1e10 and inputs["machine"]["disk_latency"] == pytest.approx(5e-5)
    assert inputs["origins"]["bus"] == inputs["origins"]["hbm"] == "given"
    assert inputs["codec"] == "bf16" and inputs["record_bytes"] == [320, 320]
    fetched = sum(shown["ngrams_a_token"]["prefill"]["fetched"]) * 8 * 320
    host = next(one for one in shown["placements"] if one["placement"] == "host")
    assert host["fits"] and host["costs"]["prefill"]["bus_bytes"] == pytest.approx(fetched)
    gather = 16 * 320 / inputs["machine"]["device_gather"]
    assert host["costs"]["prefill"]["token_us"] == pytest.approx(1e6 * (gather + fetched / 1e10))


def test_this_machine_by_default(engram):
    origins = json.loads(engram("plan", "--preset", "demo", "--json").out)["inputs"]["origins"]
    assert {origins[name] for name in ("hbm", "ram", "disk")} == {"free here"}


def test_rates_of_this_machine_are_measured_and_those_given_stay(engram, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "_TABLE_BYTES", 1 << 20)
    monkeypatch.setattr(rates, "_READS", 64)
    monkeypatch.setattr(limits, "_TABLE_BYTES", 1 << 24)
    monkeypatch.chdir(tmp_path)
    options = ("--preset", "demo", "--measure", "--disk-latency", "50")
    done = engram("plan", *options, "--json")
    assert done.code == 0 and not done.err, done
    inputs = json.loads(done.out)["inputs"]
    machine, origins = inputs["machine"], inputs["origins"]
    assert origins["host_gather"] == "measured here" and machine["host_gather"] > 1e6
    assert origins["disk_latency"] == "given" and machine["disk_latency"] == pytest.approx(5e-5)
    assert origins["disk_iops"] == "measured here" or not direct_reads(tmp_path)
    assert origins["bus"] == (
        "measured here" if torch.cuda.is_available() else "as measured on an H100 with PCIe 5 x16"
    )
    done = engram("plan", *options)
    assert "Measured here: host gather" in done.out and "add --measure" not in done.out
    assert not list(tmp_path.iterdir())


def direct_reads(folder):
    """Whether files here can be read past the page cache."""
    (folder / "file").write_bytes(bytes(4096))
    try:
        os.close(os.open(folder / "file", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    finally:
        (folder / "file").unlink()
    return True


def test_a_text_of_ones_own(engram, tmp_path, tokenizer_files):
    text = tmp_path / "text.txt"
    text.write_text("\n\f\n".join("The river leaves the stone, and a bird follows the ship.\n" * 9 for _ in range(40)))
    command = ("plan", "--preset", "deepseek-v4.1", *MACHINE, "--text", text, "--tokenizer")
    done = engram(*command, tokenizer_files["deepseek-v4"], "--json")
    assert done.code == 0, done
    shown = json.loads(done.out)
    assert "text.txt" in shown["inputs"]["text"] and "tokens, half of them to warm the cache" in shown["inputs"]["text"]
    assert min(shown["ngrams_a_token"]["decode-1"]["hit_rates"]) > 0.99
    done = engram(*command, tokenizer_files["deepseek-v3"])
    assert done.code == 1 and "use the tokenizer that the memory was made with" in done.err
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("options, needle", [
    (("--preset", "deepseek-v4"), "There is no preset 'deepseek-v4': did you mean 'deepseek-v4.1'"),
    (("--preset", "demo", "--codec", "fp9"), "no codec 'fp9'"),
    (("--preset", "demo", "--cache", "much"), "'much' is no size"),
    (("--preset", "demo", "--hbm", "-3GB"), "'-3GB' is no size"),
    (("--preset", "demo", "--text", "x.txt"), "give --text and --tokenizer, or neither"),
    (("--preset", "demo", "--text", "gone.txt", "--tokenizer", "gone.json"), "gone.json"),
    (("--preset", "demo", "--measure", "--bus", "0"), "bus is 0.0: give a number above 0"),
])  # fmt: skip
def test_mistakes_are_sentences(engram, options, needle):
    done = engram("plan", *options)
    assert done.code == 1 and needle in done.err and "Traceback" not in done.err, done


def test_qwens_scheme_wants_a_tokenizer_of_its_size(engram, tmp_path, tokenizer_files):
    (tmp_path / "text.txt").write_text("a b c")
    done = engram(
        "plan", "--preset", "qwen-ple", "--text", tmp_path / "text.txt", "--tokenizer", tokenizer_files["deepseek-v4"]
    )
    assert done.code == 1 and "give the tokenizer of its model" in done.err
