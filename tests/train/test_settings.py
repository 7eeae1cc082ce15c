"""``--set``: any field by dotted name, read as its declared type; a mistake names the nearest field."""

from __future__ import annotations

import dataclasses
import json

import pytest

from torch_engram.train import RECIPES, Recipe, change, get_recipe
from torch_engram.train.recipes import summary


def value_of(recipe: Recipe, key: str):
    fields = recipe.to_dict()
    for name in key.split("."):
        fields = fields[name]
    return fields


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_dataclass_that_survives_json_and_no_settings(name):
    recipe = get_recipe(name)
    assert dataclasses.is_dataclass(recipe) and recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert change(recipe, []) == recipe
    assert summary(name).endswith((".", ":")) or ":" in summary(name)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data=my text.txt", "my text.txt"),
        ("data=123", "123"),
        ("name=true", "true"),
        ("steps=1_000", 1000),
        ("device=cuda", "cuda"),
        ("compile=True", True),
        ("compile = false", False),
        ("clip=2", 2.0),
        ("table.lr=.5", 0.5),
        ("table.lr=1e-3", 1e-3),
        ("rates.weight_decay=0.1", 0.1),
        ("tokenizer=folder/tokenizer.json", "folder/tokenizer.json"),
        ("tokenizer=none", None),
        ("model.tie_embeddings=false", False),
        ("model.kv_heads=1", 1),
        ("model.engrams.engram.heads=3", 3),
        ("model.engrams.engram.heads=1,3", [1, 3]),
        ("model.engrams.engram.layers=[0, 1]", [0, 1]),
        ("model.engrams.engram.layers=0", [0]),
        ("out=a=b", "a=b"),
    ],
)
def test_a_setting_changes_its_field_and_nothing_else(setting, value):
    changed = change(get_recipe("tiny"), [setting])
    key = setting.split("=")[0].strip()
    assert value_of(changed, key) == value
    back = [f"{key}={json.dumps(value_of(get_recipe('tiny'), key)).strip(chr(34)).replace('null', 'none')}"]
    assert change(changed, back) == get_recipe("tiny")


def test_every_field_of_every_recipe_can_be_set_to_what_it_is():
    for name in RECIPES:
        recipe = get_recipe(name)
        follow = {
            f"model.engrams.{engram}.{size}" for engram in recipe.model.engrams for size in ("hidden", "branches")
        }

        def leaves(fields, group=""):
            for key, value in fields.items():
                if isinstance(value, dict):
                    yield from leaves(value, f"{group}{key}.")
                else:
                    yield group + key, value

        settings = [
            f"{key}={'none' if value is None else value}"
            for key, value in leaves(recipe.to_dict())
            if key not in follow and key != "model.engrams"
        ]
        assert len(settings) > 40
        assert change(recipe, settings) == recipe


def test_widths_follow():
    changed = change(get_recipe("tiny"), ["model.hidden=128", "model.heads=4", "model.branches=2"])
    assert changed.model.head_dim == 32 and changed.model.kv_heads == 4
    assert changed.model.engrams["engram"].hidden == 128 and changed.model.engrams["engram"].branches == 2
    fixed = change(get_recipe("tiny"), ["model.heads=4", "model.head_dim=10", "model.kv_heads=2"])
    assert (fixed.model.head_dim, fixed.model.kv_heads) == (10, 2)
    again = change(fixed, ["model.hidden=96"])
    assert (again.model.head_dim, again.model.kv_heads) == (10, 2)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("stpes=3", "There is no setting 'stpes': did you mean 'steps'?"),
        ("rates.matrics=1", "There is no setting 'rates.matrics': did you mean 'rates.matrices'?"),
        ("lr=1", "There is no setting 'lr': choose one of 'table.lr'."),
        ("hidden=64", "There is no setting 'hidden': did you mean 'model.hidden'?"),
        ("model.engrams.engrm.heads=1", "did you mean 'model.engrams.engram.heads'?"),
        ("model.engrams.engram.hidden=8", "did you mean 'model.hidden'?"),
        (
            "model.moe.experts=4",
            "There is no setting 'model.moe.experts': this recipe has no model.moe; use one that has",
        ),
        ("steps.more=4", "There is no setting 'steps.more': did you mean 'steps'?"),
        ("=4", "There is no setting '': choose one of 'name', 'model',"),
        ("steps", "--set 'steps' has no '=': write key=value, such as steps=200."),
        ("model=4", "model is a group of settings: set one of them, such as model.vocab_size=…"),
        ("model.engrams=4", "model.engrams is a group of settings"),
        ("steps=many", "steps is 'many': it must be a whole number."),
        ("steps=1.5", "steps is '1.5': it must be a whole number."),
        ("steps={}", "steps is '{}': it must be a whole number."),
        ("steps=[1,2]", "steps is '[1,2]': it must be a whole number."),
        ("steps=true", "steps is 'true': it must be a whole number."),
        ("steps=null", "steps is 'null': it must be a whole number."),
        ("clip=much", "clip is 'much': it must be a number."),
        ("compile=1", "compile is '1': it must be true or false."),
        ("model.kv_heads=x", "model.kv_heads is 'x': it must be none or a whole number."),
        ("model.engrams.engram.layers=a", "it must be whole numbers such as 1,3."),
        ("steps=0", "Recipe.steps is 0: it must be at least 1."),
        ("clip=nan", "Recipe.clip is nan: it must not be negative."),
        ("floor=2", "Recipe.floor is 2.0: it is a share of the peak rate, 1 at most."),
        ("seed=-1", "Recipe.seed is -1: it must be 0 to 2**63 - 1."),
        ("data=", "Recipe.data is '': it must not be empty."),
        ("table.lazy_decay=true", "TableRecipe.lazy_decay is True: set a weight_decay for it to collect."),
        ("device=gpu", "Recipe.device is 'gpu': use 'cpu' or 'cuda'."),
        ("dtype=bf61", "Recipe.dtype is 'bf61': did you mean 'bf16'?"),
        ("schedule=cosinus", "Recipe.schedule is 'cosinus': did you mean 'cosine'?"),
        ("tracker=tensorbord", "Recipe.tracker is 'tensorbord': did you mean 'tensorboard'?"),
        ("table.optimizer=adams", "TableRecipe.optimizer is 'adams': did you mean 'adam'?"),
        ("table.cache=8GB", "TableRecipe.cache is '8GB': it is for rows elsewhere: set table.placement=host, or disk."),
        ("table.staging=1GB", "TableRecipe.staging is '1GB': it is for rows on disk: set table.placement=disk."),
        ("table.prefetch=-1", "TableRecipe.prefetch is -1: it must not be negative."),
        ("table.lr=-0.1", "TableRecipe.lr is -0.1: it must not be negative."),
        ("rates.matrices=-1", "Rates.matrices is -1.0: it must not be negative."),
        ("model.heads=3", "DecoderConfig.heads is 3: it must divide hidden (64), or set head_dim."),
        ("model.engrams.engram.layers=7", "Engram 'engram' asks for layer 7 of a decoder with layers 0 to 1"),
        ("model.layers=1", "Engram 'engram' asks for layer 1 of a decoder with layers 0 to 0"),
    ],
)
def test_a_mistake_names_the_field_and_the_mend(setting, complaint):
    with pytest.raises(ValueError) as failed:
        change(get_recipe("tiny"), [setting])
    assert complaint in str(failed.value)


def test_an_unknown_recipe_has_a_nearest_one():
    with pytest.raises(ValueError, match="There is no recipe 'small-engrm': did you mean 'small-engram'"):
        get_recipe("small-engrm")


def test_a_cache_is_a_size() -> None:
    assert change(get_recipe("tiny"), ["table.placement=host", "table.cache=2MiB"]).table.cache == "2MiB"
    with pytest.raises(ValueError, match="'much' is no size"):
        change(get_recipe("tiny"), ["table.placement=host", "table.cache=much"])


def test_a_codec_that_loses_updates_is_no_recipes() -> None:
    with pytest.raises(ValueError, match="codec is 'fp8': it rounds small updates away: train in fp32 or bf16"):
        change(get_recipe("tiny"), ["table.codec=fp8"])
