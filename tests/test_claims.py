"""Every claim can be measured again, was measured, and reads in the READMEs as its CSV says."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
HEADER = "claim,case,value,unit,reference,ratio,p20,p50,p80,n,device,versions,commit,date"
SCOREBOARD: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "scoreboard.py"))
CLAIMS: list[dict[str, Any]] = SCOREBOARD["claims"]()
REWRITE = "run: python benchmarks/scoreboard.py --write"
each_claim = pytest.mark.parametrize("claim", CLAIMS, ids=[claim["id"] for claim in CLAIMS])


@each_claim
def test_a_claim_is_complete(claim: dict[str, Any]) -> None:
    assert set(claim) == {"id", "what", "goal", "unit", "script", "hardware", "cases", "beside"}
    assert (ROOT / claim["script"]).is_file()
    assert claim["cases"]
    SCOREBOARD["met"](claim["goal"], "1")


@each_claim
def test_every_case_was_measured(claim: dict[str, Any]) -> None:
    path = ROOT / "benchmarks" / "results" / f"{claim['id']}.csv"
    assert path.read_text().splitlines()[0] == HEADER
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} >= {*claim["cases"], *claim["beside"]}
    for row in rows:
        assert row["claim"] == claim["id"]
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert row["device"] and row["versions"] and row["commit"] and row["date"] and int(row["n"]) >= 1
        assert row["case"] not in claim["cases"] or row["unit"] == claim["unit"]


def test_claims_have_names_of_their_own() -> None:
    assert len({claim["id"] for claim in CLAIMS}) == len(CLAIMS)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_says_what_was_measured(name: str) -> None:
    assert SCOREBOARD["block"]((ROOT / name).read_text()) == SCOREBOARD["table"](), REWRITE


def test_the_results_page_is_current() -> None:
    assert SCOREBOARD["PAGE"].read_text() == SCOREBOARD["page"](), REWRITE


@pytest.mark.parametrize("goal, value, reached", [
    (">= 2.0", "2", True), (">= 2.0", "1.99", False), ("<= 1.10", "1.1", True), ("<= 1.10", "1.2", False),
])  # fmt: skip
def test_goals_are_compared_as_they_read(goal: str, value: str, reached: bool) -> None:
    assert SCOREBOARD["met"](goal, value) is reached
