"""The measurement of training from disk goes through on small sizes, with every case that its claim names."""

from __future__ import annotations

import importlib
import random
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CLAIMS = {claim["id"]: claim for claim in tomllib.loads((ROOT / "benchmarks" / "claims.toml").read_text())["claim"]}


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Documents of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(300)]
    file = tmp_path / "text.txt"
    file.write_text("\n\f\n".join(" ".join(draw.choices(words, k=400)) for _ in range(12)))
    return str(file)


def test_every_case_is_measured_and_the_disk_did_what_rows_need(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    disk_train: Any = importlib.import_module("disk_train")
    sizes = replace(
        disk_train.SMALL, rows=60_000, rows_in_memory=3000, hidden=16, ffn_hidden=16, vocab=300, length=32,
        turns=1, warm_up=1, plain_bytes=16 << 20, plain_blocks=500, staging="1MB", data=text,
    )  # fmt: skip
    found: dict[str, list[float]] = {}
    disk_train.measure(tmp_path, sizes, lambda claim, case, samples, unit, **rest: found.update({case: samples}))
    claim = CLAIMS["disk-io"]
    assert found.keys() | {"blocks-by-the-device"} == {*claim["cases"], *claim["beside"]}  # overlays have no device
    assert all(len(samples) and all(value > 0 for value in samples) for samples in found.values())
    (distinct,), (seconds,) = found["distinct-rows"], [ms / 1e3 for ms in found["step-on-disk"]]
    assert found["blocks"][0] * seconds < 6 * distinct  # read, and written; a few lie in two, or come back too late
    assert 0.3 < found["share-read"][0] < 0.9


def test_the_plain_benchmark_moves_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    disk_train: Any = importlib.import_module("disk_train")
    plain = disk_train.PlainMix(tmp_path / "plain", 16 << 20)
    before = np.fromfile(tmp_path / "plain", np.uint8).reshape(-1, 4096)
    moved = plain.move(400, 0.25)
    after = np.fromfile(tmp_path / "plain", np.uint8).reshape(-1, 4096)
    assert (moved.read, moved.written) == (100, 300) and moved.rate > 0
    assert (before != after).any(1).sum() == (after == 7).all(1).sum() == 300
