"""``engram finetune`` as a user runs it: trained, saved, resumed, refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from models import make_model
from torch_engram.cli import app
from torch_engram.hub import from_pretrained, memories_of
from torch_engram.hub.finetune import Finetuning, Sequences, finetune

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers tells what could be faster
SMALL: dict[str, Any] = dict(
    memory=dict(layers=(1,), rows_per_head=1000, heads=2, row_dim=8), batch_size=4, seq_len=32, lr=1e-2, save_every=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without training, and documents of sentences that come again."""
    folder, draw = tmp_path_factory.mktemp("place"), random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(50)]
    sentences = [" ".join(draw.choices(words, k=10)) for _ in range(20)]
    text = folder / "text.txt"
    text.write_text("\n\f\n".join(" ".join(draw.choices(sentences, k=4)) for _ in range(60)))
    bpe = ByteLevelBPETokenizer()
    bpe.train(str(text), vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    end = dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **end).save_pretrained(folder / "model")
    make_model("llama", vocab_size=300).save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("trains", ["memory", "lora", "full"])
def test_it_learns_and_says_what_was_trained(place: Path, tmp_path: Path, trains: str) -> None:
    plan = Finetuning(str(place / "model"), str(place / "text.txt"), str(tmp_path / "out"), trains, steps=12, **SMALL)
    told: list[int] = []
    done = finetune(plan, watch=lambda step, loss: told.append(step))
    assert done.before is not None and done.after is not None and done.after < done.before - 0.1
    assert told == list(range(1, 13)) and done.rows_touched > 100
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["result"]["after"] == done.after and metrics["plan"]["trains"] == trains
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{done.before:.4f} before, {done.after:.4f} after" in card and f"{done.rows_touched:,} trained" in card
    if trains != "lora":
        again = from_pretrained(tmp_path / "out")
        assert list(memories_of(again)) == ["memory"]


def test_a_resumed_run_ends_as_one_that_was_not(place: Path, tmp_path: Path) -> None:
    def weights(out: Path) -> dict[str, torch.Tensor]:
        model = from_pretrained(out).eval()
        return {"logits": model(torch.arange(3, 13)[None]).logits}

    plan = Finetuning(str(place / "model"), str(place / "text.txt"), str(tmp_path / "whole"), steps=8, **SMALL)
    whole = finetune(plan)
    half = Finetuning(str(place / "model"), str(place / "text.txt"), str(tmp_path / "half"), steps=8, **SMALL)

    class Stop(Exception):
        pass

    def stop(step: int, loss: float) -> None:
        if step == 6:
            raise Stop

    with pytest.raises(Stop):
        finetune(half, watch=stop)
    with pytest.raises(ValueError, match="holds a run already: pass --resume to go on with it"):
        finetune(half)
    resumed = finetune(half, resume=True)
    assert resumed.after == whole.after and resumed.before == whole.before
    assert torch.equal(weights(tmp_path / "half")["logits"], weights(tmp_path / "whole")["logits"])


def test_a_folder_without_a_model(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        finetune(Finetuning(str(tmp_path), str(place / "text.txt"), str(tmp_path / "out"), **SMALL))
    assert "There is no causal model with a tokenizer at" in str(refused.value) and "\n" not in str(refused.value)


def test_sequences_keep_documents_apart(place: Path, tmp_path: Path) -> None:
    from torch_engram.data import open_corpus, tokenize_corpus
    from torch_engram.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(place / "model")
    file = tokenize_corpus(open_corpus(str(place / "text.txt")), tokenizer, tmp_path).train
    sequences = Sequences(file, 50)
    assert len(sequences) == len(file) // 50
    for number in range(len(sequences)):
        given = sequences[number]
        first, starts = number * 50, set(file.starts.tolist())
        position = 0
        for at in range(50):
            begins = first + at in starts and at > 0
            position = 0 if at == 0 or begins else position + 1
            assert given["position_ids"][at] == position
            assert given["labels"][at] == (-100 if begins else file.tokens[first + at])


def test_the_command(place: Path, tmp_path: Path) -> None:
    options = ["--rows-per-head", "1000", "--heads", "2", "--row-dim", "8", "--seq-len", "32", "--steps", "3"]
    command = ["finetune", str(place / "model"), "--data", str(place / "text.txt"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 0, done.output
    assert "Held-out text: " in done.output and "rows trained" in done.output
    for extra, match in (
        (["--lora", "--full"], "choose one"), (["--layers", "one"], "give block numbers"),
        (["--device", "gpu"], "There is no device 'gpu'"),
    ):  # fmt: skip
        refused = CliRunner().invoke(app, [*command, *extra])
        assert isinstance(refused.exception, ValueError) and match in str(refused.exception)


def test_one_of_several_ranks_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = Finetuning(str(place / "model"), str(place / "text.txt"), str(tmp_path / "out"), **SMALL)
    with pytest.raises(ValueError, match="one of 2 ranks, and finetune trains in one process"):
        finetune(plan)
    assert not (tmp_path / "out").exists()
