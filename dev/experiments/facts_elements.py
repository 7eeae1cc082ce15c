"""Whether a taught memory forgets elements because the question's example ends in an initial: `is H.`

    python dev/experiments/facts_elements.py > dev/checks/facts-elements.log

On a GPU; some 45 s a seed. The facts study's memory (full scale, 16 exposures) is asked for the same elements in
questions that give another example than hydrogen, whose symbol and full stop are the 2-gram of many a taught name's
initial (docs/facts.md). Each line: seed, example, per cent right before and after, points lost.
"""

import copy
from dataclasses import replace

import torch

from torch_engram.data.facts import elements
from torch_engram.studies.facts.other_text import Rehearsal, to_rehearse
from torch_engram.studies.facts.prompts import Asked
from torch_engram.studies.facts.scoring import recall
from torch_engram.studies.facts.study import facts_of, full
from torch_engram.studies.facts.teaching import Lessons, teach
from torch_engram.studies.facts.ways import begin
from torch_engram.studies.facts.wordings import KNOWN, TRAINED
from torch_engram.studies.smollm2 import load_smollm2

SEEDS = 3
EXAMPLES = {"hydrogen": "H", "oxygen": "O", "iron": "Fe", "silver": "Ag", "copper": "Cu"}


def main() -> None:
    run = next(run for run in full() if run.way == "memory")
    run = replace(run, exposures=(16,))
    loaded, tokenizer = load_smollm2()
    left_out = {*EXAMPLES, "gold"}
    facts = [fact for fact in elements() if fact.subject not in left_out]
    wording = KNOWN["symbol"][0]
    exams = {
        name: Asked(facts, {"symbol": (wording.replace("hydrogen is H.", f"{name} is {symbol}."),)}, tokenizer)
        for name, symbol in EXAMPLES.items()
    }
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = copy.deepcopy(loaded).cuda()
        before = {name: ask(model, exam) for name, exam in exams.items()}
        rehearsal = Rehearsal(model, to_rehearse(tokenizer, run.scale.pieces, run.scale.piece), seed)
        asked = Asked(facts_of(run.scale), TRAINED, tokenizer)
        lessons = Lessons(asked, run.scale.batch, rehearsal, run.rehearsed, run.scale.weight, run.told_only, seed)
        taught = begin(run.way, model, tokenizer, run.scale.memory, run.rates)
        list(teach(taught, lessons, run.exposures, lambda step, loss: None))
        for name, exam in exams.items():
            after = ask(taught.model, exam)
            print(f"{seed} {name:<9} {before[name]:5.1f} {after:5.1f} {before[name] - after:5.2f}", flush=True)
        assert taught.memory is not None
        taught.memory.detach()


@torch.no_grad()
def ask(model: torch.nn.Module, exam: Asked) -> float:
    """Per cent."""
    return 100 * recall(model.eval(), exam, exam.all())["symbol"]


if __name__ == "__main__":
    main()
