"""PLE layers under Qwen4Exp's names: transformers loads what is written; what is read and written keeps its bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers.models.qwen4_exp", reason="needs transformers with Qwen4Exp")
import transformers

from torch_engram.config import EngramConfig
from torch_engram.fusion import Engram
from torch_engram.hub import read_ple, serve_ple, without_ple_tables, write_ple
from torch_engram.memory import MemoryBank, save_bank
from torch_engram.optim import RowAdam

Build = Callable[..., Any]
BankOf = Callable[..., MemoryBank]
Save = Callable[..., Path]
PLE = "model.language_model.layers.1.ple."
EMBEDDING = f"{PLE}ple_embedding."
TWO = dict(ple_layer_ids=[2, 3], split_ngram_parts=16)


def ids() -> Tensor:
    tokens = torch.randint(10, 60, (2, 14))
    tokens[0, 6] = 7
    return tokens


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor, where the index says that it is."""
    named: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(named.values())}
    return {name: files[file][name] for name, file in named.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def trained(**config: Any) -> tuple[MemoryBank, dict[int, Engram]]:
    """A bank of its own, after two steps, with Engrams of random weights."""
    made = EngramConfig.from_dict({
        "layers": (1, 2), "hidden": 32, "vocab_size": 64, "heads": 2, "row_dim": 6, "rows_per_head": 100,
        "branches": 2, "scheme": "qwen_ple", "fusion": "qwen-ple", "pad_id": 7, "seed": 5, "row_multiple": 128,
        "init_std": 0.3, **config,
    })  # fmt: skip
    bank = MemoryBank(made, optimizer=lambda rows: RowAdam(rows, lr=0.1))
    engrams = {layer: Engram(made) for layer in made.layers}
    for engram in engrams.values():
        for parameter in engram.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    for _ in range(2):
        step = bank.prefetch(ids())
        for layer in made.layers:
            step[0].wait(layer)["engram"].square().sum().backward()
        step.reduce()
        step.apply()
    return bank, engrams


@pytest.mark.parametrize("kind", ["Qwen4ExpForConditionalGeneration", "Qwen4ExpForCausalLM"])
@pytest.mark.parametrize("placement", ["bank", "memory", "served", "stripped"])
@torch.no_grad()
def test_transformers_loads_a_model_with_our_table(build: Build, tmp_path: Path, kind: str, placement: str) -> None:
    """Whose table is not the model's own: the logits are those of serving the bank, bit for bit."""
    config: dict[str, Any] = dict(layers=(1,), seed=1234)
    with torch.enable_grad():
        bank, _ = trained(**config)
    if placement == "stripped":
        with without_ple_tables():
            model = build(kind)
    else:
        model = build(kind)
    served = serve_ple(model, bank)
    tokens = ids()
    expected = model(tokens).logits
    if placement != "served":
        served.detach()
    memory: Any = bank
    if placement == "memory":
        save_bank(bank, tmp_path / "memory")
        memory = tmp_path / "memory"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_ple(memory, tmp_path / "out", model=model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    loaded, report = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), "nothing is missing or unexpected"
    assert torch.equal(loaded(tokens).logits, expected)
    again = tmp_path / "again"
    loaded.save_pretrained(again, max_shard_size="20KB")
    whole, found = tensors_of(again), tensors_of(tmp_path / "out")
    assert whole.keys() == found.keys() and all(torch.equal(tensor, found[name]) for name, tensor in whole.items())


@torch.no_grad()
def test_the_same_weights_in_the_decoder_of_transformers_and_in_ours(build: Build, tmp_path: Path) -> None:
    """Two layers and sixteen shards, whose order by number is not that by name."""
    model = build(**TWO)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    bank, engrams = read_ple(tmp_path / "model")
    assert bank.config.layers == (1, 2) and bank.in_files
    tokens = ids()
    for layer, engram in engrams.items():
        ple = model.model.language_model.layers[layer].ple
        embeddings, streams = bank.read(tokens).wait(layer)["engram"], torch.randn(*tokens.shape, 2, 32)
        assert torch.equal(embeddings, ple.ple_embedding(tokens, None))
        expected = streams + ple(streams.flatten(2), tokens, None).view(streams.shape)
        torch.testing.assert_close(engram(streams, embeddings), expected, rtol=0, atol=1e-5)
    write_ple(bank, tmp_path / "out", engrams, shards=16)
    found, before = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "model")
    before = {name: tensor for name, tensor in before.items() if ".ple." in name}
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    write_ple(bank, tmp_path / "whole", model=model)
    before = tensors_of(tmp_path / "model")
    for name, tensor in tensors_of(tmp_path / "whole").items():
        assert torch.equal(before.pop(name), tensor), name
    assert not before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writing_what_was_read_gives_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    bank, engrams = trained()
    engrams = {layer: engram.to(dtype) for layer, engram in engrams.items()}
    save_bank(bank, tmp_path / "memory")
    write_ple(bank, tmp_path / "one", engrams, shards=3)
    write_ple(tmp_path / "memory", tmp_path / "two", engrams, shards=3)
    for number, placement in enumerate(("disk", "host", "device")):
        again, read = read_ple(tmp_path / "one", placement=placement, dtype=dtype)
        assert again.config == replace(bank.config, init_std=0.0)
        write_ple(again, tmp_path / str(number), read, shards=3)
        assert contents(tmp_path / str(number)) == contents(tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    tokens = ids()
    with torch.no_grad():
        for layer in (1, 2):
            rows = again.read(tokens).wait(layer)["engram"], bank.read(tokens).wait(layer)["engram"].to(dtype)
            assert torch.equal(*rows)
    assert not list(tmp_path.glob("*.converting"))


def test_tables_alone(tmp_path: Path) -> None:
    bank, _ = trained(layers=(1,))
    write_ple(bank, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == {
        f"{EMBEDDING}{name}"
        for name in (
            "ngram_embedding.shard_0.weight",
            "layer_multipliers",
            "ngram_heads_vocab_sizes",
            "ngram_heads_offsets",
        )
    }
    again = MemoryBank(replace(bank.config, init_std=0.0), tables=tmp_path / "out", placement="disk")
    tokens = ids()
    assert torch.equal(again.read(tokens).wait(1)["engram"], bank.read(tokens).wait(1)["engram"])
    with pytest.raises(
        ValueError, match=r"There is no tensor 'model\.language_model\.layers\.1\.ple\.key_proj\.weight'"
    ):
        read_ple(tmp_path / "out")


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("ple_embedding.layer_multipliers", None, r"no tensor '.*\.layer_multipliers' in these files: give the folder"),
        ("ple_embedding.ngram_embedding.shard_1.weight", None, r"ngram_embedding\.shard_\*\.weight has no shard 1"),
        ("conv1d.weight", None, r"There is no tensor '.*layers\.1\.ple\.conv1d\.weight'"),
        (
            "key_proj.weight",
            lambda data: data[:-1],
            r"is F32 \[63, 24\], and config\.json asks for F32 or BF16 or F16 \[64",
        ),
        ("norm_key.weight", lambda data: data.to(torch.int32), r"norm_key\.weight' is I32 \[64\]"),
        ("ple_embedding.ngram_heads_offsets", lambda data: data.float(), r"offsets' is F32 \[4\], not a row of int64"),
        ("ple_embedding.ngram_heads_offsets", lambda data: data + 1, r"has offsets of layer 1 that its config\.json"),
        (
            "ple_embedding.ngram_embedding.shard_3.weight",
            lambda data: data[:-1],
            r"has 511 rows of 6 numbers, and layer 1",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    checkpoint: Path, tmp_path: Path, name: str, value: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if PLE + name in tensors:
            data = tensors.pop(PLE + name)
            save_file({**tensors, **({} if value is None else {PLE + name: value(data).clone()})}, file)
    with pytest.raises(ValueError, match=message):
        read_ple(folder)


def test_other_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for key, value, message in (
        ("ple_layer_ids", [2, 3], r"has tables of layers \[1\], and its config\.json names layers \[1, 2\]"),
        ("eos_token_id", None, "has no eos_token_id, where segments end"),
        ("rms_norm_eps", 1e-5, "says rms_norm_eps 1e-05, and Qwen4Exp's gate has 1e-06"),
        ("seed", 3, r"has multipliers of layer 1 that its config\.json does not give"),
    ):
        text = {**config["text_config"], key: value}
        (folder / "config.json").write_text(json.dumps({**config, "text_config": text}))
        with pytest.raises(ValueError, match=message):
            read_ple(folder)
    save_file({f"{PLE}bias": torch.ones(1)}, folder / "more.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"more\.safetensors holds '.*layers\.1\.ple\.bias', which this format does not"
    ):
        read_ple(folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(fusion="paper"),
            "Memory 'engram' has fusion 'paper', and Qwen4Exp has 'qwen-ple' always: train one with",
        ),
        (dict(conv_kernel=0), "has conv_kernel 0, and Qwen4Exp a convolution: train one with 4"),
        (dict(row_dim=(6, 8)), r"has row_dim \(6, 8\), and Qwen4Exp has one for all orders"),
        (dict(bias=True), "has bias True, and Qwen4Exp has False always"),
        (dict(branches=1), "has branches 1, and Qwen4Exp two or more: train one with 2"),
    ],
)
def test_memories_that_the_format_has_not(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    bank, engrams = trained(**fields)
    with pytest.raises(ValueError, match=message):
        write_ple(bank, tmp_path / "out", engrams)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit(build: Build, tmp_path: Path) -> None:
    bank, engrams = trained(layers=(1,))
    model = build("Qwen4ExpForCausalLM")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="has other multipliers at layer 1 than the model"):
        write_ple(bank, out, model=model)
    model = build("Qwen4ExpForCausalLM", seed=5)
    with pytest.raises(ValueError, match="leave out engrams=, or model="):
        write_ple(bank, out, engrams, model=model)
    with pytest.raises(ValueError, match="The model's split_ngram_parts is 4: leave out shards=3"):
        write_ple(bank, out, model=model, shards=3)
    with pytest.raises(ValueError, match="has no PLE layer"):
        write_ple(bank, out, model=build("Qwen4ExpForCausalLM", ple_layer_ids=[]))
    with pytest.raises(ValueError, match=r"Engrams are given for layers \[2\], and the memory is at \[1\]"):
        write_ple(bank, out, {2: engrams[1]})
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_saved_leaves_nothing(build: Build, tmp_path: Path, monkeypatch: Any) -> None:
    bank, _ = trained(layers=(1,))
    model = build("Qwen4ExpForCausalLM", seed=5)
    table = model.model.layers[1].ple.ple_embedding.ngram_embedding

    def full(*given: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        write_ple(bank, tmp_path / "out", model=model)
    assert not list(tmp_path.iterdir())
    assert model.model.layers[1].ple.ple_embedding.ngram_embedding is table
