"""Claim, goal, latest value, met or not; ``--write`` puts it into both READMEs, and all cases into docs/results.md."""

from __future__ import annotations

import argparse
import csv
import operator
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
READMES = (ROOT / "README.md", ROOT / "README.zh.md")
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def claims() -> list[dict[str, Any]]:
    """The entries of claims.toml."""
    entries: list[dict[str, Any]] = tomllib.loads((ROOT / "benchmarks" / "claims.toml").read_text())["claim"]
    return entries


def latest(claim: str) -> dict[str, dict[str, str]]:
    """The last row of each of a claim's cases; none where nothing was measured yet."""
    path = ROOT / "benchmarks" / "results" / f"{claim}.csv"
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def met(goal: str, value: str) -> bool:
    """Whether ``value`` reaches a goal such as ``>= 2.0``."""
    comparison, bound = goal.split()
    return bool(COMPARISONS[comparison](float(value), float(bound)))


def table() -> str:
    """One Markdown row for every case that a goal speaks of."""
    lines = ["| claim | what is measured | goal | measured | met | device |", "|---|---|---|---|---|---|"]
    for claim in claims():
        rows = latest(claim["id"])
        for place, case in enumerate(claim["cases"]):
            row = rows.get(case)
            measured, reached, device = ("not yet", "", "")
            if row is not None:
                measured = f"{number(row['value'])} {claim['unit']}"
                reached, device = "yes" if met(claim["goal"], row["value"]) else "**no**", row["device"]
            goal = claim["goal"].replace(">=", "≥").replace("<=", "≤")
            what = claim["what"] if place == 0 else "the same"
            what += f": `{case}`" if len(claim["cases"]) > 1 else ""
            cells = (f"[{claim['id']}]({claim['script']})", what, f"{goal} {claim['unit']}")
            lines.append("| " + " | ".join((*cells, measured, reached, device)) + " |")
    return "\n".join(lines)


def page() -> str:
    """docs/results.md: for every claim its goal and the latest row of each of its cases."""
    parts = [
        "# Results\n\nWritten by `python benchmarks/scoreboard.py --write` from the rows in `benchmarks/results`.\n"
    ]
    for claim in claims():
        rows = latest(claim["id"])
        lines = [f"## {claim['id']}\n\n{claim['what']}. Goal: {claim['goal']} {claim['unit']}; `{claim['script']}`.\n"]
        lines += ["| case | p20 | p50 | p80 | n | device | versions | commit |", "|---|---|---|---|---|---|---|---|"]
        for case in [*claim["cases"], *claim["beside"]]:
            if case not in rows:
                lines.append(f"| {case} | not measured yet |")
                continue
            row = rows[case]
            spread = " | ".join(number(row[name]) for name in ("p20", "p50", "p80"))
            cells = (case, f"{spread} {row['unit']}", row["n"], row["device"], row["versions"], row["commit"])
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def number(value: str) -> str:
    """Three significant digits, more before the point."""
    size = float(value)
    return f"{size:,.0f}" if size >= 1000 else f"{size:#.3g}".rstrip(".")


def block(text: str) -> str:
    """What stands between the two marks. Raises ``ValueError`` where they are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"The README needs {BEGIN} and {END} once each: put them where the results belong.")
    return text.split(BEGIN)[1].split(END)[0].strip()


def write() -> None:
    """Replace the results block of every README, and the page."""
    for path in READMES:
        text = path.read_text()
        block(text)
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        path.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
    PAGE.write_text(page())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the READMEs' results and docs/results.md")
    if parser.parse_args().write:
        write()
    print(table())
