"""Facts that ship with the package: people, capitals and elements out of WordNet 3.0 (`dev/build_facts.py`).

The shipped corpus names the same people, without their years of birth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_SHIPPED_FACTS = Path(__file__).parent / "facts"


@dataclass(frozen=True)
class Fact:
    """``relation`` of ``subject`` is ``answer``: the year in which somebody was ``born``, a ``nationality``, a
    ``profession``, a country's ``capital``, an element's ``symbol``."""

    subject: str
    relation: str
    answer: str


def people() -> list[Fact]:
    """Nationality, profession and year of birth of 2,139 people, three facts in a row each, by name."""
    relations = ("nationality", "profession", "born")
    return [
        Fact(name, relation, answer)
        for name, *answers in _lines("people")
        for relation, answer in zip(relations, answers, strict=True)
    ]


def capitals() -> list[Fact]:
    """Of 167 countries and states of the United States; Georgia is both."""
    return [Fact(country, "capital", capital) for country, capital in _lines("capitals")]


def elements() -> list[Fact]:
    """The symbols of 116 chemical elements."""
    return [Fact(name, "symbol", symbol) for name, symbol in _lines("elements")]


def _lines(name: str) -> list[list[str]]:
    text = (_SHIPPED_FACTS / f"{name}.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()]
