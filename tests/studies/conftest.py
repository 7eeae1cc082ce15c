"""A text for studies of pretraining: so short that a run takes a second."""

from __future__ import annotations

import random

import pytest

WORDS = [
    "by",
    "the",
    "way",
    "king",
    "sent",
    "word",
    "to",
    "all",
    "united",
    "states",
    "that",
    "knew",
    "of",
    "no",
    "such",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    draw = random.Random(0)
    passage = " ".join(draw.choices(WORDS, k=30))  # some documents repeat it, so that held-out text was seen in part
    documents = [f"{passage if i % 3 else ''} {' '.join(draw.choices(WORDS, k=40))} {i}" for i in range(200)]
    path = tmp_path_factory.mktemp("study") / "corpus.txt"
    path.write_text("\n\f\n".join(documents))
    return str(path)
