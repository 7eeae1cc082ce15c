"""Rebuild the facts that ship with the package, `src/torch_engram/data/facts/`, from WordNet 3.0.

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb WORK_DIR
    python dev/build_facts.py WORK_DIR

Tab-separated, one fact or person a line: people who are named by more than one word, with nationality, profession and
year of birth; countries with their capitals; elements with their symbols. The licence is that of the glosses in the
corpus beside them.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FACTS = Path("src/torch_engram/data/facts")
PERSON_FILE = "18"
BORN = re.compile(r"\((?:born (?:in )?)?(1\d{3})(?:\?)?(?:-\d{4})?\)")
ORIGIN = re.compile(r"(?:a |an |the )?(United States|British|[A-Z][a-z]+(?:ish|an|ese|ch|ic|ss|sh|ek))\b")
AMERICAN = "United States"
TOO_GENERAL = {"person", "leader", "female", "male", "woman", "man", "expert", "creator"}
FEWEST = 5
"""People that share a nationality or a profession: rarer ones are no facts to ask for."""


@dataclass(frozen=True)
class Synset:
    """A line of WordNet's database of nouns."""

    file: str
    words: list[str]
    instance_of: list[str]
    gloss: str


def synsets(folder: Path) -> dict[str, Synset]:
    found = {}
    for line in (folder / "usr/share/wordnet/data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        fields, _, gloss = line.partition(" | ")
        parts = fields.split(" ")
        words = [parts[4 + 2 * i].replace("_", " ") for i in range(int(parts[3], 16))]
        kinds = [parts[i + 1] for i, part in enumerate(parts) if part == "@i"]
        found[parts[0]] = Synset(parts[1], words, kinds, gloss.strip())
    return found


def people(nouns: dict[str, Synset]) -> Iterator[tuple[str, str, str, str]]:
    """Name, nationality, profession (of what kind of people somebody is an instance), year of birth."""
    found = []
    for each in nouns.values():
        born, origin = BORN.search(each.gloss), ORIGIN.match(each.gloss)
        names = [word for word in each.words if " " in word]
        if each.file != PERSON_FILE or not (born and origin and names and each.instance_of):
            continue
        profession = nouns[each.instance_of[0]].words[0]
        nationality = "American" if origin[1] == AMERICAN else origin[1]
        if profession not in TOO_GENERAL and profession.islower():
            found.append((names[0], nationality, profession, born[1]))
    nationalities, professions = (Counter(fact[i] for fact in found) for i in (1, 2))
    taken: set[str] = set()
    for fact in sorted(found):
        if nationalities[fact[1]] >= FEWEST and professions[fact[2]] >= FEWEST and fact[0] not in taken:
            taken.add(fact[0])
            yield fact


def capitals(nouns: dict[str, Synset]) -> Iterator[tuple[str, str]]:
    """Country, capital: of countries that WordNet has as such."""
    as_country = re.compile(r"an? .*(republic|country|kingdom|state|nation)\b")
    countries = {word for each in nouns.values() if as_country.match(each.gloss) for word in each.words}
    found = set()
    for each in nouns.values():
        for word in each.words:
            country = word.removeprefix("capital of ").removeprefix("the ")
            if word.startswith("capital of ") and country in countries and "capital" in each.gloss:
                found.add((country, each.words[0]))
    yield from sorted(found)


def elements(nouns: dict[str, Synset]) -> Iterator[tuple[str, str]]:
    """Element, symbol, in the order of their numbers."""
    found = {}
    for each in nouns.values():
        number = next((word.rpartition(" ")[2] for word in each.words if word.startswith("atomic number ")), None)
        symbol = next((word for word in each.words if re.fullmatch(r"[A-Z][a-z]{0,2}", word)), None)
        if number and symbol:
            found[int(number)] = (each.words[0], symbol)
    for _, fact in sorted(found.items()):
        yield fact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path, help="where wordnet-base is unpacked")
    nouns = synsets(parser.parse_args().work_dir)
    FACTS.mkdir(parents=True, exist_ok=True)
    for name, facts in (("people", people(nouns)), ("capitals", capitals(nouns)), ("elements", elements(nouns))):
        lines = ["\t".join(fact) + "\n" for fact in facts]
        (FACTS / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(lines):,}")


if __name__ == "__main__":
    main()
