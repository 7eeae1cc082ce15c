"""Help is instant and complete: torch is not imported for it, and every verb says what it does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

VERBS = (
    "demo", "finetune", "eval", "train", "recipes", "sample", "trace", "gates", "plan", "table", "bench", "study",
    "analyze",
)  # fmt: skip
SUBVERBS = (
    ["bench", "ops"], ["bench", "step"], ["bench", "lookup"],
    ["table", "info"], ["table", "verify"], ["table", "synth"], ["table", "convert"],
    ["table", "export"], ["study", "facts"], ["study", "recipe"], ["study", "report"],
    ["study", "allocation"], ["study", "slots"],
    ["analyze", "collisions"], ["analyze", "usage"], ["analyze", "lens"], ["analyze", "cka"],
    ["analyze", "ablate"], ["analyze", "locate"],
)  # fmt: skip


def modules_after(code: str) -> str:
    """Which of the heavy packages a fresh interpreter has imported after ``code``."""
    program = f"{code}\nimport sys; print([m for m in ('torch', 'numpy', 'tokenizers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_help_never_imports_torch():
    """The help of the command and of all its verbs, as ``main`` prints it."""
    assert (
        modules_after(
            f"""
import sys
from torch_engram.cli import main
for verb in ([], *([verb] for verb in {VERBS!r}), *{SUBVERBS!r}):
    sys.argv = ["engram", *verb, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
"""
        )
        == "[]"
    )


def test_the_package_is_lazy():
    assert modules_after("import torch_engram; torch_engram.__version__") == "[]"
    assert "torch" in modules_after("import torch_engram; torch_engram.EngramConfig; torch_engram.MemoryBank")


def test_every_public_name_is_found_and_no_other():
    import torch_engram

    for name in torch_engram.__all__:
        assert getattr(torch_engram, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Engrams'"):
        getattr(torch_engram, "Engrams")  # noqa: B009


def test_every_verb_and_every_option_has_help_text():
    from torch_engram.cli import app

    command = typer.main.get_command(app)
    assert set(command.commands) == set(VERBS)
    groups = {group: command.commands[group].commands for group in ("bench", "table", "study", "analyze")}
    below = {f"{group} {name}": verb for group, verbs in groups.items() for name, verb in verbs.items()}
    assert set(below) == {" ".join(words) for words in SUBVERBS}
    for name, verb in {**command.commands, **below}.items():
        assert verb.help and verb.help.strip()[0].isupper(), name
        for parameter in verb.params:
            assert parameter.name == "help" or parameter.help, (name, parameter.name)


@pytest.mark.parametrize("words", [*([verb] for verb in VERBS), *SUBVERBS], ids=" ".join)
def test_the_help_of_a_verb(engram, words):
    done = engram(*words, "--help")
    assert done.code == 0 and f"engram {' '.join(words)}" in done.out.replace("Usage: ", "")


def test_recipes_are_listed_one_a_line(engram_process, capsys, monkeypatch):
    from torch_engram.cli import main
    from torch_engram.train.recipes import RECIPES, summary

    monkeypatch.setattr(sys, "argv", ["engram", "recipes"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[name, summary(name)] for name in RECIPES]


@pytest.mark.parametrize("arguments", [("trian",), ("train",), ("train", "tiny", "--sett", "a=b"), ("sample", "x")])
def test_a_usage_mistake_is_no_traceback(engram, arguments):
    done = engram(*arguments)
    assert done.code == 2 and "Usage: engram" in done.err and "Traceback" not in done.err


def test_the_version(engram):
    import torch_engram

    assert engram("--version").out == f"torch-engram {torch_engram.__version__}"


def test_a_traceback_for_those_who_want_one(engram, monkeypatch):
    assert engram("train", "tinny").err.startswith("engram: There is no recipe 'tinny'")
    monkeypatch.setenv("ENGRAM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="There is no recipe 'tinny'"):
        engram("train", "tinny")
