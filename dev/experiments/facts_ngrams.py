"""Which n-grams the questions of the facts study share with what is taught there, and how many other text does.

    python dev/experiments/facts_ngrams.py > dev/checks/facts-ngrams.log

An n-gram is taught where it ends in a name's or an answer's token (docs/facts.md). Whatever shares one reads rows that
were taught; what shares none reads such rows by collision alone.
"""

from collections import Counter

from torch_engram.studies.facts.other_text import ELSEWHERE, REHEARSED, windows
from torch_engram.studies.facts.prompts import Asked
from torch_engram.studies.facts.scoring import known_facts
from torch_engram.studies.facts.study import FULL, facts_of
from torch_engram.studies.facts.wordings import KNOWN, TRAINED
from torch_engram.studies.smollm2 import load_smollm2

ORDERS = 2, 3


def ngrams(ids: list[int], order: int) -> list[tuple[int, ...]]:
    return [tuple(ids[end - order : end]) for end in range(order, len(ids) + 1)]


def main() -> None:
    tokenizer = load_smollm2()[1]
    taught: dict[int, set[tuple[int, ...]]] = {order: set() for order in ORDERS}
    asked = Asked(facts_of(FULL), TRAINED, tokenizer)
    for prompts in (asked.prompts([one]) for one in asked.all()):
        ids, told = prompts.ids[0].tolist(), prompts.told[0].tolist()
        for order in ORDERS:
            taught[order] |= {gram for gram, here in zip(ngrams(ids, order), told[order - 1 :], strict=True) if here}
    print(f"{len(asked.facts)} facts teach", ", ".join(f"{len(taught[n])} {n}-grams" for n in ORDERS))
    known = Asked(known_facts(), KNOWN, tokenizer)
    for relation in KNOWN:
        questions = [one for one in known.all() if known.facts[one[0]].relation == relation]
        for order in ORDERS:
            shared = [taught[order] & {*ngrams(known.prompts([one]).ids[0].tolist(), order)} for one in questions]
            common = Counter(tokenizer.decode(list(gram)) for grams in shared for gram in grams).most_common(8)
            print(f"{relation}: {sum(map(bool, shared))} of {len(questions)} questions share a {order}-gram: {common}")
    for name in (*REHEARSED, *ELSEWHERE):
        for order in ORDERS:
            grams = [gram for piece in windows(tokenizer, name, 32, 256).tolist() for gram in ngrams(piece, order)]
            print(f"{name}: {100 * sum(gram in taught[order] for gram in grams) / len(grams):.2f} % of {order}-grams")


if __name__ == "__main__":
    main()
