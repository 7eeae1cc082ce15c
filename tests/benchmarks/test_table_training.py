"""Ways to train a table, at a tiny size: all get the same gradients and are reported; what does not fit is, too."""

from __future__ import annotations

import csv
import math
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
figure: Any = import_module("table_figure")
table_training: Any = import_module("table_training_gpu")
table_ways: Any = import_module("table_ways")

OURS = ("ours-adam", "ours-rowwise", "ours-adam-host")
WAYS = (*OURS, "dense-adam", "sparse-adam")
Notes = dict[str, tuple[list[float], str]]


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    """What a run tells, by case."""
    told: Notes = {}
    monkeypatch.setattr(table_training, "tell", lambda case, samples, unit, **_: told.update({case: (samples, unit)}))
    return told


def run(*arguments: str) -> None:
    table_training.main(["--tiny", "--turns", "2", "--steps", "1", *arguments])


def test_every_way_is_timed_at_every_size(notes: Notes) -> None:
    """That their gradients agree is checked by the script itself, before it times them."""
    run("--rows", "1600", "16000")
    for label in ("0.0016M", "0.016M"):
        for way in ("network", *WAYS):
            samples, unit = notes[f"{way}-{label}-step"]
            assert unit == "ms" and len(samples) == 2 and all(0 < sample < math.inf for sample in samples)
        assert all(len(notes[f"{way}-over-ours-{label}"][0]) == 2 for way in WAYS[1:])
        assert all(count > 100 for count in notes[f"distinct-{label}"][0])


@pytest.mark.parametrize("when", ["build", "update"])
def test_what_runs_out_of_memory_is_a_row_that_says_so(
    notes: Notes, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    def dense(setting: Any) -> Any:
        if when == "build":
            fail()
        way = table_ways.torch_table(setting, sparse=False)
        way.update = fail
        return way

    both = {name: kind for name, kind in table_ways.kinds(None).items() if name in ("ours-adam", "sparse-adam")}
    full = {**both, "dense-adam": table_ways.Kind(dense, lambda dim: 0)}
    monkeypatch.setattr(table_training, "kinds", lambda peft: full)
    run("--rows", "1600")
    assert notes["dense-adam-0.0016M-step"] == ([math.inf], "ms (out of memory)")
    assert notes["dense-adam-over-ours-0.0016M"] == ([math.inf], "times (out of memory)")
    assert notes["sparse-adam-0.0016M-step"][1] == "ms", "others go on"


def test_a_wrong_gradient_is_not_timed(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(setting: Any) -> Any:
        way = table_ways.torch_table(setting, sparse=True)
        real = way.gradients
        way.gradients = lambda rows: 1.1 * real(rows)
        return way

    monkeypatch.setattr(table_training, "kinds", lambda peft: {"wrong": table_ways.Kind(wrong, lambda dim: 0)})
    with pytest.raises(AssertionError, match=r"off by 0\.1"):
        run("--rows", "1600")


def test_ways_are_grouped_by_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card of 80 GiB: at 100 M rows of 64, RowAdam's table leaves no room for another way's."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Card", (), {"total_memory": 80 * 2**30}))
    config = table_training.engram_at(1600, 64, 64, 1000)

    def groups(rows: int) -> list[list[str]]:
        layout = type("Layout", (), {"rows": rows})
        setting = table_ways.Setting("", config, None, layout, [], torch.device("cuda"), torch.bfloat16)
        return list(table_training.together(table_ways.kinds(Path("wheel")), setting))

    every = [*WAYS, "peft-sparse", "peft-dense"]
    assert groups(1_000_000) == groups(10_000_000) == [every]
    assert groups(100_000_000)[:2] == [["ours-adam"], ["ours-rowwise", "ours-adam-host"]]
    assert [name for group in groups(100_000_000) for name in group] == every


def test_the_figure_shows_what_was_measured(tmp_path: Path) -> None:
    results, drawn = tmp_path / "table-training.csv", tmp_path / "figure.svg"
    values = {
        "distinct-1M": 5e5, "distinct-100M": 6e5, "network-1M-step": 40, "ours-adam-1M-step": 50,
        "ours-adam-100M-step": 51.25, "ours-adam-1M-peak": 3, "dense-adam-1M-step": 60,
        "dense-adam-100M-step": math.inf,
    }  # fmt: skip
    with open(results, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("case", "value"), *values.items()])
    figure.draw(results, drawn)
    text = drawn.read_text()
    assert "51.25 ms" in text and "nn.Embedding, Adam (fused) (100M: out of memory)" in text and "inf" not in text
