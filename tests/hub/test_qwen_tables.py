"""Models that are loaded without tables, files that are served in place, and what is refused by name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers.models.qwen4_exp", reason="needs transformers with Qwen4Exp")
from transformers import LlamaConfig, LlamaForCausalLM, Qwen4ExpForCausalLM, Qwen4ExpForConditionalGeneration

from torch_engram.hub import serve_ple, without_ple_tables
from torch_engram.memory import MemoryBank

Build = Callable[..., Any]
BankOf = Callable[..., MemoryBank]
Save = Callable[..., Path]
GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
TABLE = "ple_embedding.ngram_embedding"


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(10, 60, (2, 14))
    ids[0, 6] = 7
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def load(folder: Path, kind: Any = Qwen4ExpForConditionalGeneration, **options: Any) -> Any:
    with without_ple_tables():
        return kind.from_pretrained(folder, **options)


@pytest.mark.parametrize("kind", [Qwen4ExpForConditionalGeneration, Qwen4ExpForCausalLM])
def test_all_but_the_table_is_loaded(checkpoint: Path, kind: Any) -> None:
    model, report = load(checkpoint, kind, output_loading_info=True)
    assert not any(report.values()), "nothing is missing or unexpected"
    whole = kind.from_pretrained(checkpoint).state_dict()
    left_out = {name for name in whole if TABLE in name}
    assert len(left_out) == 1 and set(model.state_dict()) == set(whole) - left_out
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    with pytest.raises(ValueError, match=re.escape("loaded without its PLE tables: call serve_ple(model, path)")):
        model(**tokens())


def test_the_classes_are_as_before(checkpoint: Path, build: Build) -> None:
    with pytest.raises(ZeroDivisionError), without_ple_tables(), without_ple_tables():
        build("Qwen4ExpForCausalLM")
        _ = 1 / 0
    assert isinstance(build().model.language_model.layers[1].ple.ple_embedding.ngram_embedding, torch.nn.Embedding)
    _, report = Qwen4ExpForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values())


def test_built_without_memory_for_the_table(build: Build) -> None:
    with without_ple_tables():
        model = build("Qwen4ExpForCausalLM", ngram_vocab_size_base=20_000_000)
    embedding = model.model.layers[1].ple.ple_embedding
    assert embedding.ngram_embedding.num_embeddings > 80_000_000 and not embedding.layer_multipliers.is_meta


@pytest.mark.parametrize(
    "placement, stored, dtype",
    [
        ("disk", torch.float32, torch.float32),
        ("disk", torch.bfloat16, torch.bfloat16),
        ("disk", torch.float32, torch.bfloat16),  # rounded on the way, as from_pretrained rounds
        ("host", torch.bfloat16, torch.float32),
        ("device", torch.float16, torch.float32),
    ],
)
@torch.no_grad()
def test_served_from_the_shards_in_place(
    save: Save, tmp_path: Path, placement: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    folder, inputs = save(tmp_path / "model", stored), tokens()
    original = Qwen4ExpForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    model = load(folder, dtype=dtype)
    serve_ple(model, folder, placement=placement)
    assert torch.equal(model(**inputs).logits, original(**inputs).logits)
    found = [m.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=2) for m in (original, model)]
    assert torch.equal(*found)


@torch.no_grad()
def test_the_guides_lines(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = re.search(r"```py\n(.*?serve_ple.*?)```", GUIDE.read_text(), re.DOTALL)
    assert lines is not None
    (tmp_path / "Qwen4-Exp").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(lines[1], names)
    inputs, original = tokens(), Qwen4ExpForConditionalGeneration.from_pretrained(checkpoint)
    assert torch.equal(names["model"](**inputs).logits, original(**inputs).logits)


@torch.no_grad()
def test_a_save_leaves_the_tables_where_they_are(save: Save, tmp_path: Path) -> None:
    folder, inputs = save(tmp_path / "model"), tokens()
    model = load(folder)
    model.lm_head.weight.mul_(2)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    served = serve_ple(model, folder)
    for part in (model, model.model, model.model.language_model):
        with pytest.raises(ValueError, match=r"ngram_embedding\.shard_0\.weight', and a served model is saved without"):
            part.save_pretrained(folder, max_shard_size="20KB")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert not any(TABLE in name for file in (tmp_path / "tuned").glob("*.safetensors") for name in load_file(file))
    model.save_pretrained(tmp_path / "tuned", max_shard_size="40KB")  # over a save that has none
    again = load(tmp_path / "tuned")
    serve_ple(again, folder)
    assert torch.equal(again(**inputs).logits, expected)
    served.detach()
    again.save_pretrained(tmp_path / "third")


def change(folder: Path, suffix: str, value: Callable[[Tensor], Tensor]) -> None:
    """Change the tensors whose names end so."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if any(name.endswith(suffix) for name in tensors):
            made = {name: value(data) if name.endswith(suffix) else data for name, data in tensors.items()}
            save_file(made, file, {"format": "pt"})


@pytest.mark.parametrize(
    "suffix, value, message",
    [
        (
            "shard_3.weight",
            lambda data: data[:-1].clone(),
            r"has 511 rows of 6, and the model's layer 1 reads 512 of 6",
        ),
        (
            "layer_multipliers",
            lambda data: data + 2,
            r"has other multipliers at layer 1 than the model \(\d+, \d+, \d+ for \d+, \d+, \d+\), so that its rows .*"
            "serve the tables of the checkpoint that the model was loaded from",
        ),
        ("ngram_heads_vocab_sizes", lambda data: data.flip(0), r"has other head sizes at layer 1 .*\(109, 107, 103, …"),
        ("ngram_heads_offsets", lambda data: data + 1, "has other offsets at layer 1"),
    ],
)
def test_files_of_another_model(
    checkpoint: Path, tmp_path: Path, suffix: str, value: Callable[[Tensor], Tensor], message: str
) -> None:
    model, other = load(checkpoint), shutil.copytree(checkpoint, tmp_path / "other")
    change(other, suffix, value)
    with pytest.raises(ValueError, match=message):
        serve_ple(model, other)
    assert TABLE not in str(model.state_dict().keys())
    serve_ple(model, checkpoint)  # a refusal leaves the model as it was


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(ple_layer_ids=[3]), r"has no PLE table of layer 1, which the model reads \(it has one of layer 2\)"),
        (dict(ple_layer_ids=[]), r"has no PLE table of layer 1, which the model reads: give the folder"),
        (dict(ple_embed_dim=48), r"shard_\*\.weight in .* has 512 rows of 12, and the model's layer 1 reads 512 of 6"),
        (
            dict(ngram_vocab_size_base=400),
            r"has 1,664 rows of 6, and the model's layer 1 reads 512 of 6: give the folder",
        ),
        (dict(seed=5), "has other multipliers at layer 1"),
    ],
)
def test_tables_of_another_model(
    checkpoint: Path, save: Save, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    kinds = ["linear_attention", "linear_attention", "linear_attention", "indexed_attention"]
    other = save(tmp_path / "other", **{"layer_types": kinds, **changes})
    with pytest.raises(ValueError, match=message):
        serve_ple(load(checkpoint), other)


@pytest.mark.parametrize(
    "config, options, message",
    [
        (dict(layers=(2,)), dict(layouts=None), r"is at layers \[2\], and the model reads layer 1: make the bank with"),
        (dict(row_dim=12), {}, "has 512 rows of 12 at layer 1, and the model reads 512 of 6: make the bank of"),
        (dict(rows_per_head=400), dict(layouts=None), "has 1,664 rows of 6 at layer 1, and the model reads 512"),
        (dict(seed=3), dict(layouts=None), "Memory 'engram' has other multipliers at layer 1 than the model"),
        ({}, dict(codec="int8"), "keeps rows in int8, which rounds them, .*: serve rows in fp32, bf16 or fp16"),
        (
            {},
            dict(dtype=torch.bfloat16),
            "in torch.bfloat16, and the model computes in torch.float32: .* dtype=torch.fl",
        ),
    ],
)
def test_banks_that_do_not_fit(
    build: Build, bank_of: BankOf, config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    model = build("Qwen4ExpForCausalLM")
    with pytest.raises(ValueError, match=message):
        serve_ple(model, bank_of(model, config, **options))


def test_other_mistakes(build: Build, bank_of: BankOf, checkpoint: Path, tmp_path: Path) -> None:
    model = build("Qwen4ExpForCausalLM")
    bank = bank_of(model)
    with pytest.raises(ValueError, match="placed already: leave out placement='disk', or give a folder"):
        serve_ple(model, bank, placement="disk")
    with pytest.raises(ValueError, match="nowhere is no file: give"):
        serve_ple(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="There is no placement 'dsik'"):
        serve_ple(model, checkpoint, placement="dsik")
    serve_ple(model, bank)
    with pytest.raises(ValueError, match=r"served already: detach\(\)"):
        serve_ple(model, bank)
    with pytest.raises(ValueError, match="has no PLE layer"):
        serve_ple(build("Qwen4ExpForCausalLM", ple_layer_ids=[]), bank)
    small = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="LlamaForCausalLM is no Qwen4Exp model"):
        serve_ple(LlamaForCausalLM(LlamaConfig(**small)), bank)
    with pytest.raises(ValueError, match="on the meta device: load them"):
        serve_ple(build("Qwen4ExpForCausalLM").to("meta"), bank)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_transformers_one_sentence_says_what_to_install() -> None:
    done = run("import sys; sys.modules['transformers'] = None; import torch_engram.hub")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: torch_engram.hub needs transformers 5.17 or newer: pip install 'torch-engram[hf]'"
    )
    done = run("import sys, torch_engram as t; t.MemoryBank; sys.exit('transformers' in sys.modules)")
    assert done.returncode == 0, done.stderr
