"""An EngramConfig survives JSON, derives its sizes, and refuses nonsense with a sentence that names the field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.config import PRESETS, EngramConfig

GOOD: dict[str, Any] = dict(layers=(1, 2), hidden=8, vocab_size=40)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = EngramConfig.preset(name)
    assert EngramConfig.from_json(config.to_json()) == config
    assert hash(config) == hash(EngramConfig.from_json(config.to_json()))


@pytest.mark.parametrize(
    "name, columns, width",
    [("demo", 16, 1024), ("paper-27b", 16, 1280), ("deepseek-v4.1", 24, 6144), ("qwen-ple", 16, 2560)],
)
def test_sizes_of_presets(name: str, columns: int, width: int) -> None:
    config = EngramConfig.preset(name)
    assert (config.columns, config.embedding_dim) == (columns, width)
    assert config.conv_dilation == config.max_ngram


@given(
    st.integers(2, 6).flatmap(lambda n: st.tuples(*[st.lists(st.integers(1, 9), min_size=n - 1, max_size=n - 1)] * 2))
)
def test_sizes_by_order(sizes: tuple[list[int], list[int]]) -> None:
    heads, dims = sizes
    config = EngramConfig(**GOOD, max_ngram=len(heads) + 1, heads=heads, row_dim=dims)
    assert config.columns == sum(heads)
    assert config.embedding_dim == sum(h * d for h, d in zip(heads, dims, strict=True))
    assert EngramConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "field, value",
    [
        ("layers", ()), ("layers", (2, 1)), ("layers", (1, 1)), ("layers", (-1,)), ("layers", 1), ("layers", "12"),
        ("hidden", 0), ("hidden", 8.0), ("vocab_size", 0), ("vocab_size", "40"), ("max_ngram", 1), ("heads", 0),
        ("heads", (1,)), ("heads", 2.0), ("row_dim", (4, 0)), ("row_dim", (4, 4, 4)), ("rows_per_head", 1),
        ("rows_per_head", (5, None)), ("branches", 0), ("scheme", "engrams"), ("fusion", "papre"), ("pad_id", -1),
        ("seed", -1), ("conv_kernel", 1), ("row_multiple", 0), ("init_std", -0.1),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"EngramConfig\.{field} is "):
        EngramConfig.from_dict({**GOOD, field: value})


def test_misspelt_and_missing_names_are_told() -> None:
    with pytest.raises(ValueError, match="no field 'row_dims': did you mean 'row_dim'"):
        EngramConfig.from_dict({**GOOD, "row_dims": 3})
    with pytest.raises(ValueError, match="needs the field 'vocab_size'"):
        EngramConfig.from_dict({"layers": [1], "hidden": 8})
    with pytest.raises(ValueError, match="did you mean 'paper-27b'"):
        EngramConfig.preset("paper27b")
    for text in ("[1]", "3", "{", ""):
        with pytest.raises(ValueError, match="in JSON is one object with its fields: use what to_json"):
            EngramConfig.from_json(text)
