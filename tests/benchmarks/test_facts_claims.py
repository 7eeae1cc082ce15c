"""The claims about taught facts are what the committed log of the study holds."""

from __future__ import annotations

import csv
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from torch_engram.studies.facts.report import report
from torch_engram.studies.facts.study import full
from torch_engram.studies.grid import all_results, results
from torch_engram.studies.report import write_report

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
facts: Any = import_module("facts")
record: Any = import_module("record")


def test_the_committed_rows_are_the_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    facts.main([])
    for path in tmp_path.iterdir():
        with open(path, newline="") as made, open(BENCHMARKS / "results" / path.name, newline="") as committed:
            latest = {row["case"]: row for row in csv.DictReader(committed)}
            assert {row["case"]: row for row in csv.DictReader(made)} == latest
    assert len(list(tmp_path.iterdir())) == 4


def test_the_committed_tables_are_the_log_s(tmp_path: Path) -> None:
    lines = results(full(), facts.LOG)
    assert len({str(line["run"]) for line in lines}) == len(full())
    assert lines == all_results(facts.LOG)
    write_report(report(lines), tmp_path)
    for name in ("facts.csv", "facts.md"):
        assert (tmp_path / name).read_text() == (facts.LOG / name).read_text()
