"""The demo: a dense decoder, a mixture of experts, and the same with a memory, on the same tokens in the same order.

The memory is paid for by experts: the second and the third run have equal total and equal active parameters, and the
first has their active ones. Everything else is shared, from the tokenizer to the order of the batches.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from torch_engram.addressing import layouts
from torch_engram.config import EngramConfig
from torch_engram.models import DecoderConfig, MoEConfig
from torch_engram.models.accounting import Account, match_budget
from torch_engram.train import Outcome, Progress, Rates, Recipe, TableRecipe, Trainer
from torch_engram.train.build import Text, build_text, fit_to_text
from torch_engram.train.metrics import METRICS_FILE

LABELS = {"dense": "dense", "moe": "MoE", "engram": "MoE + Engram"}

SENTENCES = (
    "Only Alexander the Great could tame the horse Bucephalus.",
    "Diana, Princess of Wales, was the first wife of Prince Charles.",
    "By the way, I have a message for the President of the United States.",
    "四大發明",
    "張仲景",
    "床前明月光，疑是地上霜。",
    "白日依山盡，黃河入海流。",
)
"""What the gates are shown on; Chinese in traditional characters, as in the corpus."""

Watch = Callable[[str, int], AbstractContextManager[Callable[[Progress], None]]]

PROMPTS = ("The United States", "By the way,", "def __init__(self,", "白日依山")


def demo_recipe(out: Path) -> Recipe:
    """What the three runs share, with the mixture of experts as the model."""
    moe = MoEConfig(experts=32, top_k=2, expert_hidden=64, shared_hidden=128)
    model = DecoderConfig(vocab_size=4096, hidden=128, layers=4, heads=4, ffn_hidden=256, moe=moe)
    return Recipe(
        "moe",
        model,
        out=str(out / "runs"),
        cache=str(out / "cache"),
        validation_share=0.01,
        seq_len=256,
        batch_size=16,
        steps=120,
        warmup=20,
        schedule="linear",
        floor=0.0,
        eval_every=50,
        eval_batches=6,
        log_every=5,
        save_every=0,
        keep=1,
        rates=Rates(matrices=8e-3, embedding=1.28e-1, other=1.28e-1),  # best of the grid in dev/tuning
        table=TableRecipe(lr=2e-2),
    )


def demo_recipes(shared: Recipe, text: Text) -> dict[str, Recipe]:
    """The three runs by name: ``dense``, ``moe``, ``engram``. Raises ``ValueError`` when budgets cannot be matched."""
    experts = fit_to_text(shared.model, text.tokenizer, text.vocab)
    assert experts.moe is not None
    width = experts.moe.top_k * experts.moe.expert_hidden + experts.moe.shared_hidden
    dense = dataclasses.replace(experts, moe=None, ffn_hidden=width)
    engram = EngramConfig(
        layers=(1, 2), hidden=experts.hidden, vocab_size=text.vocab.size, heads=2, row_dim=32, rows_per_head=9_000
    )
    tables = sum(layout.rows for layout in layouts(engram).values()) * 32
    memory = match_budget(experts, dataclasses.replace(experts, engrams={"engram": engram}), tables)
    models = {"dense": dense, "moe": experts, "engram": memory}
    return {name: replace(shared, name=name, model=model) for name, model in models.items()}


@dataclass(frozen=True)
class DemoRun:
    """One of the three runs, trained."""

    recipe: Recipe
    trainer: Trainer
    outcome: Outcome
    account: Account


def run_demo(shared: Recipe, watch: Watch) -> dict[str, DemoRun]:
    """Train the three runs of a shared recipe; ``watch(label, steps)`` gives each a context with its progress callback.

    Earlier runs in the same folder are replaced. Ctrl-C ends the present run; the later ones are then left out.
    """
    text = build_text(shared)
    runs = {}
    for name, recipe in demo_recipes(shared, text).items():
        _remove_earlier(Path(recipe.out) / recipe.name)
        trainer = Trainer(recipe, text=text)
        with watch(LABELS[name], recipe.steps) as progress:
            outcome = trainer.run(progress)
        runs[name] = DemoRun(recipe, trainer, outcome, trainer.account)
        if trainer.stopped:
            break
    return runs


def _remove_earlier(folder: Path) -> None:
    """Remove a run of this name. Raises ``ValueError`` for a folder that is something else."""
    if folder.exists() and not (folder / METRICS_FILE).exists():
        raise ValueError(f"{folder} is not a run of the demo: choose another --out.")
    shutil.rmtree(folder, ignore_errors=True)
