"""``engram bench`` from the command to its CSV and page, on a CPU at the smallest sizes."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from torch_engram.bench import OPS

COLUMNS = ["case", "value", "unit", "reference", "ratio", "p20", "p50", "p80", "n", "device", "versions", "date"]
SMALL = ("--device", "cpu", "--tokens", "64", "--rows", "300", "--vocab", "80", "--repeats", "2")


def rows_of(path: Path, lead: list[str]) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == [*lead, *COLUMNS]
        rows = list(reader)
    for row in rows:
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert row["value"] == row["p50"] and int(row["n"]) >= 1 and row["device"] and row["versions"] and row["date"]
    return rows


def chart_of(path: Path) -> str:
    """The text in the page's plot, which is well-formed XML."""
    text = path.read_text()
    chart = ElementTree.fromstring(text[text.index("<figure>") : text.index("</figure>") + len("</figure>")])
    assert chart.findall(".//rect")
    return " ".join(chart.itertext())


def test_ops(engram, tmp_path, monkeypatch):
    """Every op that there is; those that take long on a CPU are taken away, for tests/bench runs them one by one."""
    for slow in ("muon", "row-update", "experts", "hyper-connections"):
        monkeypatch.delitem(OPS, slow)
    done = engram("bench", "ops", *SMALL, "--against", "naive", "--out", str(tmp_path / "bench"))
    assert done.code == 0 and not done.err, done
    rows = rows_of(tmp_path / "bench" / "ops.csv", ["op", "sizes"])
    assert [row["op"] for row in rows] == [name for name in OPS for _ in range(3)]
    assert [row["case"] for row in rows[:3]] == ["ours", "naive", "naive-over-ours"]
    for ours, naive, speed_up in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert float(ours["ratio"]) == pytest.approx(float(ours["value"]) / float(ours["reference"]), rel=1e-4)
        assert float(speed_up["ratio"]) == pytest.approx(float(naive["value"]) / float(ours["value"]), rel=1e-4)
        assert "tokens=64" in ours["sizes"]
    chart, page = chart_of(tmp_path / "bench" / "ops.html"), (tmp_path / "bench" / "ops.html").read_text()
    for name in OPS:
        assert name in done.out and name in chart
    assert "this library" in page and "naive" in page and "Moved:" in page
    assert sorted(path.name for path in (tmp_path / "bench").iterdir()) == ["ops.csv", "ops.html"]


def test_one_op_alone(engram, tmp_path):
    done = engram("bench", "ops", *SMALL, "--only", "merge", "--dtype", "bf16", "--out", str(tmp_path))
    assert done.code == 0 and "speed-up" not in done.out
    (row,) = rows_of(tmp_path / "ops.csv", ["op", "sizes"])
    assert row["op"] == "merge" and row["case"] == "ours" and "dtype=bf16" in row["sizes"]


@pytest.fixture(scope="module")
def step_settings(corpus_file, tiny):
    settings = [
        setting for setting in tiny if setting != "--set" and not setting.startswith(("steps=", "name=", "out="))
    ]
    sets = [part for setting in (*settings, f"data={corpus_file}") for part in ("--set", setting)]
    return (*sets, "--turns", "2", "--steps", "1")


def test_step(engram, tmp_path, step_settings):
    done = engram("bench", "step", "tiny", *step_settings, "--against", "naive", "--out", str(tmp_path / "bench"))
    assert done.code == 0 and not done.err, done
    rows = rows_of(tmp_path / "bench" / "step.csv", ["recipe", "settings"])
    assert [row["case"] for row in rows] == [
        "step", "speed", "flops", "utilisation", "step-without-lookups", "lookup-exposed", "step-naive",
        "naive-over-ours",
    ]  # fmt: skip
    found = {row["case"]: row for row in rows}
    assert "seq_len=16" in found["step"]["settings"]
    assert float(found["utilisation"]["value"]) > 0 and found["speed"]["unit"] == "tokens/s"
    assert "tiny" in chart_of(tmp_path / "bench" / "step.html") and "tokens/s" in done.out and "TFLOP/s" in done.out
    assert sorted(path.name for path in (tmp_path / "bench").iterdir()) == ["step.csv", "step.html"]


@pytest.mark.parametrize(
    "arguments, needles",
    [
        (("ops", "--only", "adressing"), ("no op 'adressing'", "did you mean 'addressing'?")),
        (("ops", "--against", "nave"), ("'nave'", "did you mean 'naive'?")),
        (("ops", "--device", "gpu"), ("no device 'gpu'", "use 'cpu' or 'cuda'")),
        (("ops", "--device", "cpu", "--dtype", "fp16"), ("no dtype 'fp16'",)),
        (("ops", "--device", "cpu", "--tokens", "100"), ("tokens is 100", "multiple of 64")),
        (("step", "tinny"), ("no recipe 'tinny'", "did you mean 'tiny'?")),
        (("step", "tiny", "--against", "nave"), ("'nave'", "did you mean 'naive'?")),
        (("step", "tiny", "small-moe"), ("different devices", "--set device=cuda")),
        (("step", "tiny", "--set", "step=3"), ("no setting 'step'",)),
        (("step", "tiny", "--set", "steps=3"), ("--set steps=3 has no meaning here", "--turns and --steps")),
        (
            ("ops", "--device", "cpu", "--tokens", "4000000000", "--only", "loss"),
            ("do not fit into memory", "--tokens"),
        ),
    ],
)
def test_a_mistake_is_one_sentence(engram, tmp_path, arguments, needles):
    done = engram("bench", *arguments, "--out", str(tmp_path / "bench"))
    assert done.code == 1 and done.err.startswith("engram: "), done
    for needle in needles:
        assert needle in done.err
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize("verb", ["ops", "step"])
def test_a_folder_that_takes_no_files_is_found_out_first(engram, tmp_path, verb):
    (tmp_path / "file").write_text("")
    done = engram("bench", verb, "--out", str(tmp_path / "file" / "bench"))
    assert done.code == 1 and "cannot be written" in done.err and "choose another folder with --out" in done.err
