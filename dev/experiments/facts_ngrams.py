"""Which n-grams the questions of the facts study share with what is taught there, and how many other text does.

    python dev/experiments/facts_ngrams.py > dev/checks/facts-ngrams.log

An n-gram is taught where it ends in a told token of a name or an answer (docs/facts.md); n-grams are of canonical ids,
as a memory hashes them. What shares none reads taught rows by collision alone; how often that is, is told first.
"""

from collections import Counter

import torch
from torch import Tensor

from torch_engram.addressing import CanonicalVocab
from torch_engram.studies.facts.other_text import ELSEWHERE, REHEARSED, windows
from torch_engram.studies.facts.prompts import Asked
from torch_engram.studies.facts.scoring import known_facts
from torch_engram.studies.facts.study import FULL, facts_of
from torch_engram.studies.facts.wordings import KNOWN, TRAINED
from torch_engram.studies.smollm2 import load_smollm2

ORDERS = 2, 3
PIECES, LENGTH = 32, 256
"""The exam's."""

Gram = tuple[int, ...]


def ngrams(ids: list[int], order: int) -> list[Gram]:
    return [tuple(ids[end - order : end]) for end in range(order, len(ids) + 1)]


def main() -> None:
    tokenizer = load_smollm2()[1]
    canonical = CanonicalVocab.of(tokenizer).ids

    def canonical_of(ids: Tensor) -> list[int]:
        found: list[int] = canonical[ids].tolist()
        return found

    taught: dict[int, set[Gram]] = {order: set() for order in ORDERS}
    asked = Asked(facts_of(FULL), TRAINED, tokenizer)
    for prompts in (asked.prompts([one]) for one in asked.all()):
        ids, told = canonical_of(prompts.ids[0]), prompts.told[0].tolist()
        for order in ORDERS:
            taught[order] |= {gram for gram, here in zip(ngrams(ids, order), told[order - 1 :], strict=True) if here}
    for order in ORDERS:
        free = 1 - len(taught[order]) / FULL.memory["rows_per_head"]
        hit = 100 * (1 - free ** FULL.memory["heads"])
        print(f"{len(asked.facts)} facts teach {len(taught[order])} {order}-grams; of others {hit:.0f} % meet one")
    known = Asked(known_facts(), KNOWN, tokenizer)
    for relation in KNOWN:
        questions = [known.prompts([one]).ids[0] for one in known.all() if known.facts[one[0]].relation == relation]
        for order in ORDERS:
            common, shared = Counter[str](), 0
            for ids in questions:
                grams = zip(ngrams(canonical_of(ids), order), ngrams(ids.tolist(), order), strict=True)
                found = {tokenizer.decode(list(written)) for gram, written in grams if gram in taught[order]}
                common.update(found)
                shared += bool(found)
            print(f"{relation}: {shared} of {len(questions)} questions share a {order}-gram: {common.most_common(8)}")
    for name in (*REHEARSED, *ELSEWHERE):
        pieces = windows(tokenizer, name, PIECES, LENGTH, "validation" if name in REHEARSED else None)
        for order in ORDERS:
            grams = [gram for piece in pieces for gram in ngrams(canonical_of(piece), order)]
            print(f"{name}: {100 * sum(gram in taught[order] for gram in grams) / len(grams):.2f} % of {order}-grams")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
