"""lm-evaluation-harness on a model with a memory: through its own class, as full forwards say, and ``engram eval``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="needs pip install --no-deps lm-eval, and sacrebleu: make test")

from typer.testing import CliRunner

from models import make_model, make_tokenizer
from torch_engram.cli import app
from torch_engram.hub import attach, config_for, from_pretrained
from torch_engram.hub.evaluate import evaluate, find_tasks

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness, datasets and transformers tell what could be newer
NAMES = ("choose", "say", "read")
EXAMPLES = [json.loads(line) for line in (Path(__file__).parent / "tasks" / "capitals.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def beside_the_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tasks name their data from where the harness runs."""
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # a second and more, each time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a memory whose every row says something."""
    made, tokenizer = make_model("llama"), make_tokenizer()
    config = config_for(made, tokenizer, layers=(0, 2), heads=2, row_dim=8, rows_per_head=500, init_std=1.0)
    memory = attach(made, tokenizer, config)
    with torch.no_grad():
        for engram in memory.engrams.values():
            engram.convolution.weight.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("saved")
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_the_harness_reads_what_full_forwards_say(folder: Path) -> None:
    """Of every example alone: its choices, its text, and a continuation, which the harness takes in padded batches."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = from_pretrained(folder), make_tokenizer()

    def ids(text: str) -> Tensor:
        found: Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
        return found

    def log_probability(before: Tensor, after: Tensor) -> float:
        whole = torch.cat((before, after), 1)
        logits = model(whole, use_cache=False).logits[:, before.shape[1] - 1 : -1]
        return logits.log_softmax(-1).gather(2, after[..., None]).sum().item()

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    tasks = find_tasks(NAMES, "tasks")
    results: Any = simple_evaluate(harness, tasks=list(NAMES), task_manager=tasks.manager, bootstrap_iters=0)
    samples = results["samples"]
    end = torch.tensor([[tokenizer.eos_token_id]])
    for choose, say, read, example in zip(*(samples[name] for name in NAMES), EXAMPLES, strict=True):
        question = ids(example["question"])
        for choice, (found, _) in zip(example["choices"], choose["filtered_resps"], strict=True):
            assert found == pytest.approx(log_probability(question, ids(choice)), abs=1e-4)
        text = ids(f"{example['question']} {example['choices'][example['answer']]}")
        assert read["filtered_resps"][0] == pytest.approx(log_probability(end, text), abs=1e-4)
        for _ in range(4):
            question = torch.cat((question, model(question, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        assert say["filtered_resps"][0].split() == tokenizer.decode(question[0, -4:]).split()


def test_what_the_memory_changed(folder: Path, tmp_path: Path) -> None:
    command = ["eval", str(folder), "--tasks", "choose, read", "--include-path", "tasks", "--compare"]
    done = CliRunner().invoke(app, [*command, "--batch-size", "2", "--limit", "4", "--out", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    values = {name: found[name]["results"]["read"]["word_perplexity,none"] for name in ("with_memories", "without")}
    line = next(line for line in done.output.splitlines() if "word_perplexity" in line)
    one, other = values["with_memories"], values["without"]
    assert line.split() == ["read", "word_perplexity", "↓", f"{one:.4f}", f"{other:.4f}", f"{one - other:+.4f}"]
    assert abs(one - other) > 0.1 and found["without"]["n-samples"]["read"]["effective"] == 4
    assert [line.split()[:2] for line in done.output.splitlines() if line.startswith("choose")] == [
        ["choose", "acc"],
        ["choose", "acc_norm"],
    ]


def test_memories_are_as_they_were_and_one_run_has_one_column(folder: Path) -> None:
    model = from_pretrained(folder)
    before = model(torch.arange(3, 9)[None]).logits
    found = evaluate(model, make_tokenizer(), find_tasks(["read"], "tasks"), limit=1)
    assert found.without is None and [score.without for score in found.scores()] == [None]
    assert torch.equal(model(torch.arange(3, 9)[None]).logits, before)


def test_mistakes_are_one_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*options: str, model: Path = folder, tasks: str = "read") -> str:
        done = CliRunner().invoke(app, ["eval", str(model), "--tasks", tasks, "--include-path", "tasks", *options])
        assert isinstance(done.exception, (ValueError, OSError)), done.output
        assert "\n" not in str(done.exception)
        return str(done.exception)

    assert "holds no memories: load it with AutoModelForCausalLM" in refused(model=tmp_path)
    with monkeypatch.context() as few:  # in place of the harness's own tasks, which take long to list
        few.setattr("lm_eval.tasks.manager.__file__", str(Path(__file__).parent / "tasks" / "manager.py"))
        assert "There is no task 'chose': did you mean 'choose'?" in refused(tasks="read,chose")
        assert "There is no task '': `lm-eval ls tasks` lists those there are." in refused(tasks="read,")
    assert "There is no folder nowhere: give one with the YAML" in refused("--include-path", "nowhere")
    assert "There is no device 'gpu'" in refused("--device", "gpu")
    assert "for --out: make it, or give another file" in refused("--out", str(tmp_path / "nowhere" / "out.json"))
    monkeypatch.chdir(tmp_path)
    assert "tasks/capitals.jsonl" in refused("--include-path", str(Path(__file__).parent / "tasks"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    assert "pip install 'torch-engram[eval]'" in refused()


def test_a_folder_without_a_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "memories").symlink_to(folder / "memories")
    with pytest.raises(ValueError, match=r"^There is no causal model with a tokenizer at '[^\n]*$"):
        from_pretrained(tmp_path)
