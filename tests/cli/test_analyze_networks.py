"""``engram analyze lens``, ``cka``, ``ablate`` and ``locate`` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
LAPTOP = (
    "model.layers=3", "model.heads=2", "device=cpu", "dtype=fp32", "compile=false", "capture=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def other(engram_process: Command, corpus_file: Path, tiny: tuple[str, ...], tmp_path_factory) -> Path:
    """A run without a memory and of one block more, with the same corpus and so the same tokenizer."""
    out = tmp_path_factory.mktemp("dense")
    shared = [setting for setting in tiny[1::2] if "engrams" not in setting]
    settings = [part for one in (*shared, *LAPTOP, f"data={corpus_file}", f"out={out}") for part in ("--set", one)]
    done = engram_process("train", "small-dense", *settings)
    assert done.code == 0, done
    return out / "small-dense"


def test_the_lens_with_the_memory_and_without(engram: Command, trained: Path, corpus_file: Path) -> None:
    words = ("analyze", "lens", str(trained), "--text", str(corpus_file), "--tokens", "600")
    found = json.loads(engram(*words, "--json").out)
    on, off = found["kl"], found["kl_without_memory"]
    assert len(on) == len(off) == 3 and on != off
    assert on[-1] == off[-1] == 0 and min(on[:-1] + off[:-1]) > 0
    assert 500 < found["tokens"] <= 600
    shown = engram(*words).out
    assert "after blocks" in shown and "KL without memory" in shown and f"0 {on[0]:.4f} {off[0]:.4f}" in shown


def test_the_lens_of_a_model_without_a_memory(engram: Command, other: Path, corpus_file: Path) -> None:
    words = ("analyze", "lens", str(other), "--text", str(corpus_file), "--tokens", "300")
    assert json.loads(engram(*words, "--json").out)["kl_without_memory"] is None
    assert "without memory" not in engram(*words).out


def test_the_lens_reads_the_shipped_corpus_by_default(engram: Command, trained: Path) -> None:
    assert json.loads(engram("analyze", "lens", str(trained), "--tokens", "200", "--json").out)["tokens"] > 150


def test_which_layers_are_like_which(engram: Command, trained: Path, other: Path, corpus_file: Path) -> None:
    words = ("analyze", "cka", str(trained), str(other), "--text", str(corpus_file), "--tokens", "700")
    found = json.loads(engram(*words, "--json").out)
    matrix, depths = found["cka"], found["alignment"]
    assert len(matrix) == len(depths) == 3 and {len(row) for row in matrix} == {4}
    assert found["positions"] > 500 and found["nearest"] == 5 and all(0 <= depth <= 3 for depth in depths)
    shown = engram(*words).out
    best = max(matrix[1])
    assert f"1 {depths[1]:.4f} {matrix[1].index(best)} {best:.4f}" in shown and str(other) in shown
    itself = json.loads(engram(*words[:3], str(trained), *words[4:], "--json").out)["cka"]
    assert [itself[layer][layer] for layer in range(len(itself))] == pytest.approx([1.0] * len(itself))


def test_only_at_entities(engram: Command, trained: Path, other: Path, corpus_file: Path, tmp_path: Path) -> None:
    entities = tmp_path / "entities.txt"
    entities.write_text("the horse\nthe king\n\nthe ship\n")
    words = ("analyze", "cka", str(trained), str(other), "--text", str(corpus_file), "--entities", str(entities))
    found = json.loads(engram(*words, "--json").out)
    # Each stands twice in each of forty documents, and what is less than a sequence is left out.
    assert 100 < found["positions"] <= 3 * 2 * 40


def test_mistakes_are_one_sentence(engram: Command, trained: Path, corpus_file: Path, tmp_path: Path) -> None:
    done = engram("analyze", "lens", str(tmp_path))
    assert done.code == 1 and done.err.startswith("engram:") and "is neither a run's folder" in done.err
    none = tmp_path / "none.txt"
    none.write_text("\n")
    words = ("analyze", "cka", str(trained), str(trained), "--text", str(corpus_file), "--entities", str(none))
    assert "names no entity" in engram(*words).err
    none.write_text("xylophone")
    assert "None of the 1 entities stands" in engram(*words).err
    assert "There is no file or folder" in engram("analyze", "lens", str(trained), "--text", "nowhere/at.txt").err


def test_models_of_different_tokenizers(
    engram: Command, engram_process: Command, trained: Path, tiny, tmp_path
) -> None:
    text = tmp_path / "other.txt"
    text.write_text("\n\f\n".join(f"Zebras graze by lake {number} while jackals howl." for number in range(40)))
    settings = ("--set", f"data={text}", "--set", f"out={tmp_path}")
    assert engram_process("train", "tiny", *tiny, *settings).code == 0
    done = engram("analyze", "cka", str(trained), str(tmp_path / "tiny"))
    assert done.code == 1 and "have different tokenizers" in done.err


def test_a_memory_switched_off_by_text(engram: Command, trained: Path, corpus_file: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.txt"
    second.write_text("the king and the horse, the horse and the king. " * 40)
    words = ("analyze", "ablate", str(trained), "--text", str(corpus_file), "--text", str(second), "--tokens", "400")
    found = json.loads(engram(*words, "--json").out)
    assert list(found) == [str(corpus_file), str(second)]
    for one in found.values():
        assert one["without"] != one["whole"] and set(one["without_one"]) == {"engram at 1"}
        assert one["without_one"]["engram at 1"] == pytest.approx(one["without"], rel=1e-6)
    shown, first = engram(*words).out, found[str(corpus_file)]
    assert "without engram at 1" in shown and f"{first['whole']:.4f}" in shown


def test_where_an_answer_comes_from(engram: Command, trained: Path) -> None:
    words = ("analyze", "locate", str(trained), "--prompt", "By the way, the", "--answer", " king")
    found = json.loads(engram(*words, "--json").out)
    assert found["log_probability"] != found["without"]
    best = found["carriers"][0]
    assert best["lost"] == max(one["lost"] for one in found["carriers"]) and best["text"] in "By the way, the king"
    shown = engram(*words, "--top", "1").out
    assert repr(best["text"]) in shown and f"{best['lost']:+.4f}" in shown and "without a memory" in shown
    assert "need a token each" in engram(*words[:3], "--prompt", "", "--answer", "king").err


def test_a_model_without_a_memory_has_nothing_to_switch_off(engram: Command, other: Path) -> None:
    done = engram("analyze", "ablate", str(other), "--tokens", "200")
    assert done.code == 1 and "has no memory to switch off" in done.err
