"""The named recipes: Python functions that return a :class:`Recipe`. A docstring's first line lists it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch_engram.config import EngramConfig, nearest
from torch_engram.models import DecoderConfig, MoEConfig
from torch_engram.train.recipe import Rates, Recipe, TableRecipe

RECIPES: dict[str, Callable[[], Recipe]] = {}


def recipe(function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Register a recipe under its function's name, underscores as dashes."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def get_recipe(name: str) -> Recipe:
    """The recipe of this name. Raises ``ValueError`` with the nearest name."""
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}: {nearest(name, RECIPES)}")
    return RECIPES[name]()


def summary(name: str) -> str:
    """One line about a recipe."""
    return (RECIPES[name].__doc__ or "").strip().splitlines()[0]


@recipe
def tiny() -> Recipe:
    """A 2-layer decoder with Engram that trains in a minute on a laptop: for trying things."""
    engram = EngramConfig(layers=(1,), hidden=64, vocab_size=2048, heads=2, row_dim=16, rows_per_head=5_000)
    model = DecoderConfig(vocab_size=2048, hidden=64, layers=2, heads=2, ffn_hidden=128, engrams={"engram": engram})
    return Recipe("tiny", model, seq_len=128, batch_size=8, steps=200, warmup=20, eval_every=100)


@recipe
def small_dense() -> Recipe:
    """An 8-layer dense decoder, 512 wide, for one GPU: the baseline."""
    model = DecoderConfig(vocab_size=16_384, hidden=512, layers=8, heads=8, ffn_hidden=1536, tie_embeddings=False)
    return Recipe(
        "small-dense",
        model,
        seq_len=1024,
        batch_size=128,
        steps=490,
        device="cuda",
        dtype="bf16",
        compile=True,
        capture=True,
    )


@recipe
def small_moe() -> Recipe:
    """The same with a mixture of 56 experts, 3 routed and 1 shared a token."""
    base = small_dense()
    moe = MoEConfig(experts=56, top_k=3, expert_hidden=384, shared_hidden=384)
    return replace(base, name="small-moe", model=replace(base.model, moe=moe))


@recipe
def small_engram() -> Recipe:
    """The same with 29 experts and 3.5 M rows of memory at layers 1 and 4."""
    base = small_moe()
    assert base.model.moe is not None
    engram = EngramConfig(layers=(1, 4), hidden=512, vocab_size=16_384, heads=2, row_dim=32, rows_per_head=436_000)
    model = replace(base.model, moe=replace(base.model.moe, experts=29), engrams={"engram": engram})
    return replace(base, name="small-engram", model=model, rates=Rates(), table=TableRecipe(lr=6e-3, prefetch=1))
