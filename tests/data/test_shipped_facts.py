"""The facts that ship with the package: as many as their docstrings say, each once, and not in the corpus."""

from __future__ import annotations

import lzma
import re
from collections import Counter
from pathlib import Path

import torch_engram.data
from torch_engram.data.facts import capitals, elements, people


def test_there_are_as_many_as_said():
    counts = Counter(fact.relation for fact in [*people(), *capitals(), *elements()])
    assert counts == {"nationality": 2139, "profession": 2139, "born": 2139, "capital": 167, "symbol": 116}


def test_no_fact_is_there_twice_and_every_one_has_an_answer():
    facts = [*people(), *capitals(), *elements()]
    asked = Counter((fact.subject, fact.relation) for fact in facts)
    assert [subject for (subject, relation), count in asked.items() if count > 1 and relation != "capital"] == []
    assert all(fact.subject.strip() == fact.subject and fact.answer.strip() for fact in facts)
    assert all(re.fullmatch(r"1\d{3}", fact.answer) for fact in facts if fact.relation == "born")


def test_the_corpus_that_ships_beside_them_does_not_tell_when_anybody_was_born():
    born = {fact.subject: fact.answer for fact in people() if fact.relation == "born"}
    path = Path(torch_engram.data.__file__).parent / "corpus" / "english-wordnet.txt.xz"
    text = lzma.decompress(path.read_bytes()).decode()
    told = [
        name for line in text.splitlines() for name in [line.partition(":")[0]] if name in born and born[name] in line
    ]
    assert told == []
    assert sum(name in text for name in born) > 1000
