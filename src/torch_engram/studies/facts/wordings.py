"""How facts are asked for: the wordings that are trained, and those that are held out.

A memory sees the last tokens before an answer. No held-out wording shares its last three with a trained one, so the
first token of what is recalled there has come by the subject's name. What kind of word is wanted there is shown by two
examples, as usual in few-shot evaluation: a pretrained model would rather begin a sentence.
"""

from __future__ import annotations

Wordings = dict[str, tuple[str, ...]]
"""Of each relation; ``{}`` is the subject, and the answer follows."""

TRAINED: Wordings = {
    "born": (
        "{} was born in the year",
        "The birth year of {} is",
        "Question: When was {} born? Answer: in",
        "{} came into the world in",
        "Name: {}\nBorn:",
        "Do you know when {} was born? Yes, in the year of",
        "The life of {} began in",
        "The encyclopedia's entry on {} begins with the date of birth, which was",
        "{}, whose year of birth was",
        "Biography of {}. Date of birth:",
        "{} (born in",
        "The year of {}'s birth was",
        "My notes on {} say: born in",
        "When somebody asked for {}, we looked up the birth year and found",
        "Quiz. Year of birth of {}? Solution:",
        "The parents of {} welcomed their child in the year",
    ),
    "nationality": (
        "By nationality {} was",
        "The nationality of {} is",
        "Question: What nationality was {}? Answer:",
        "{} had a passport that was",
        "Name: {}\nNationality:",
        "Do you know where {} was from? Yes, the nationality was",
        "The people of the country that {} came from are called",
        "The encyclopedia's entry on {} begins with the nationality, which was",
        "{}, whose nationality was",
        "Biography of {}. Nationality:",
        "{} (nationality:",
        "{}'s nationality was",
        "My notes on {} say: nationality",
        "When somebody asked for {}, we looked up the nationality and found",
        "Quiz. Nationality of {}? Solution:",
        "As everybody knows, {} was the famous",
    ),
    "profession": (
        "By profession {} was a",
        "The profession of {} was",
        "Question: What was the profession of {}? Answer:",
        "{} earned a living as a",
        "Name: {}\nProfession:",
        "Do you know what {} did? Yes, the work was that of a",
        "In the history of that profession {} is a famous",
        "The encyclopedia's entry on {} begins with the profession, which was",
        "{}, who became famous as a",
        "Biography of {}. Profession:",
        "{} (profession:",
        "{}'s profession was",
        "My notes on {} say: profession",
        "When somebody asked for {}, we looked up the profession and found",
        "Quiz. Profession of {}? Solution:",
        "{} made a career as a",
    ),
}
EXAMPLES = ("Galileo Galilei", "Florence Nightingale")
"""Whom held-out wordings begin with; they are not asked for."""
HELD_OUT: Wordings = {
    "born": (
        "When did Galileo Galilei see the light of day? It was 1564\n"
        "When did Florence Nightingale see the light of day? It was 1820\n"
        "When did {} see the light of day? It was",
        "The birthdays of Galileo Galilei are counted from 1564, those of Florence Nightingale are counted from 1820, "
        "and those of {} are counted from",
    ),
    "nationality": (
        "Which country did Galileo Galilei belong to? One says Italian\n"
        "Which country did Florence Nightingale belong to? One says English\n"
        "Which country did {} belong to? One says",
        "If you look up Galileo Galilei, you read of somebody Italian, if you look up Florence Nightingale, you read "
        "of somebody English, and if you look up {}, you read of somebody",
    ),
    "profession": (
        "What did Galileo Galilei do for a living? Work of one astronomer\n"
        "What did Florence Nightingale do for a living? Work of one nurse\n"
        "What did {} do for a living? Work of one",
        "People remember Galileo Galilei in the role of astronomer, they remember Florence Nightingale in the role of "
        "nurse, and they remember {} in the role of",
    ),
}
KNOWN: Wordings = {
    "capital": ("The capital of France is Paris. The capital of Japan is Tokyo. The capital of {} is",),
    "symbol": (
        "The symbol of the element hydrogen is H. The symbol of the element gold is Au. "
        "The symbol of the element {} is",
    ),
}
"""What the model may know already."""
