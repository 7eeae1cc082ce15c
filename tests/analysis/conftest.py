"""A model trained for a few steps on a small corpus in two scripts, shared by all tests of the room."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_models import hub_model, word_tokenizer

from torch_engram.config import EngramConfig
from torch_engram.data import DOCUMENT_SEPARATOR
from torch_engram.data.batches import Batch
from torch_engram.models import DecoderConfig
from torch_engram.train import Loaded, Recipe, TableRecipe, Trainer, open_checkpoint

VERSES = ("床前明月光，疑是地上霜。", "白日依山盡，黃河入海流。")


def documents() -> Iterator[str]:
    for i in range(60):
        yield f"{VERSES[i % 2]}\nBy the way, the {i} horses of Wales were seen {i * i} times by the way.\n"


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A finished run: two residual branches, memory at two layers, more rows than the text can touch."""
    folder = tmp_path_factory.mktemp("run")
    corpus = folder / "corpus.txt"
    corpus.write_text(f"\n{DOCUMENT_SEPARATOR}\n".join(documents()), encoding="utf-8")
    engram = EngramConfig(
        layers=(0, 1), hidden=16, vocab_size=320, heads=(2, 1), row_dim=(4, 8), rows_per_head=2_000, branches=2
    )
    model = DecoderConfig(
        vocab_size=320, hidden=16, layers=2, heads=2, ffn_hidden=16, branches=2, engrams={"engram": engram}
    )
    recipe = Recipe(
        "tiny", model, data=str(corpus), validation_share=0.3, out=str(folder), cache=str(folder / "cache"),
        seq_len=32, batch_size=2, accumulation=2, steps=6, warmup=1, log_every=1, eval_every=2, eval_batches=2,
        table=TableRecipe(lr=0.1),
    )  # fmt: skip
    trainer = Trainer(recipe)
    trainer.run()
    return trainer


@pytest.fixture(scope="session")
def dense(trainer: Trainer) -> Trainer:
    """The same without memory."""
    recipe = trainer.recipe
    model = dataclasses.replace(recipe.model, engrams={})
    dense = Trainer(dataclasses.replace(recipe, name="dense", model=model), text=trainer.text)
    dense.run()
    return dense


@pytest.fixture(scope="session")
def loaded(trainer: Trainer) -> Loaded:
    return open_checkpoint(trainer.folder)


@pytest.fixture(scope="session")
def checkpoint(trainer: Trainer) -> Path:
    return trainer.folder


@pytest.fixture(scope="session")
def seen(trainer: Trainer) -> list[Batch]:
    """The batches that the run was trained on."""
    recipe = trainer.recipe
    return [trainer.data.batch(number) for number in range(recipe.steps * recipe.accumulation)]


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that was saved with a memory, whose rows are not zero."""
    transformers = pytest.importorskip("transformers")
    from torch_engram.hub import attach, config_for

    transformers.logging.disable_progress_bar()
    model = hub_model("llama")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), pad_token="<pad>", eos_token="<end>"
    )
    fields: dict[str, Any] = dict(layers=(0, 1), heads=2, row_dim=8, rows_per_head=300, init_std=0.5)
    attach(model, tokenizer, config_for(model, tokenizer, **fields))
    folder = tmp_path_factory.mktemp("hub") / "llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
