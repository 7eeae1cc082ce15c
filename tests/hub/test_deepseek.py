"""DeepSeek-V4.1's names: what is written is what the format says, and what is read and written keeps its bytes."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

pytest.importorskip("transformers.models.qwen4_exp", reason="needs transformers with Qwen4Exp")

from torch_engram.addressing import CanonicalVocab
from torch_engram.config import EngramConfig
from torch_engram.fusion import Engram
from torch_engram.hub import read_deepseek, write_deepseek
from torch_engram.hub.deepseek_weights import dequantise
from torch_engram.memory import MemoryBank, save_bank
from torch_engram.optim import RowAdam
from torch_engram.stores import CODECS, make_keys
from torch_engram.stores.open_files import OpenFile

CONFIG = EngramConfig(
    layers=(1, 3), hidden=32, vocab_size=40, max_ngram=4, heads=2, row_dim=64, rows_per_head=50, branches=2,
    conv_kernel=0, fusion="deepseek-v4.1", init_std=0.5,
)  # fmt: skip
TOKENS = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(5))


# -- memories and folders -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """60 ids, 40 of them canonical."""
    words = [f"w{number}" for number in range(40)]
    return Tokenizer(WordLevel({word: number for number, word in enumerate([*words, *map(str.upper, words[:20])])}))


@pytest.fixture(scope="module")
def vocab(tokenizer: Tokenizer) -> CanonicalVocab:
    return CanonicalVocab.build(tokenizer)


Train = Callable[..., tuple[MemoryBank, dict[int, Engram]]]


@pytest.fixture
def train(vocab: CanonicalVocab) -> Train:
    """A bank after two steps, and Engrams of random weights; ``config``: other fields."""

    def make(codec: str = "fp32", **config: Any) -> tuple[MemoryBank, dict[int, Engram]]:
        made = replace(CONFIG, **config)
        words = vocab if made.scheme == "engram" else None
        bank = MemoryBank(made, words, optimizer=lambda rows: RowAdam(rows, lr=0.1), codec=codec)
        engrams = {layer: Engram(made) for layer in made.layers}
        for engram in engrams.values():
            torch.nn.init.normal_(engram.query_weight), torch.nn.init.normal_(engram.key_weight)
        for _ in range(2):
            step = bank.prefetch(TOKENS % made.vocab_size)
            for layer, engram in engrams.items():
                streams = torch.randn(*TOKENS.shape, made.branches, made.hidden)
                engram(streams, step[0].wait(layer)["engram"]).square().sum().backward()
            step.reduce()
            step.apply()
        return bank, engrams

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_library(folder: Path) -> dict[str, Tensor]:
    """Every tensor that the index names, read by safetensors."""
    named: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in named.items():
        with safe_open(folder / file, framework="pt") as opened:
            found[name] = opened.get_tensor(name)
    return found


def test_what_is_written_has_the_names_and_shapes_of_the_format(
    train: Train, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bank, engrams = train()
    write_deepseek(bank, tmp_path / "out", engrams, tokenizer=tokenizer)
    found, rows = by_library(tmp_path / "out"), [layout.rows for layout in bank.addressing.layouts.values()]
    e4m3, e8m0, bf16 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16
    expected = {}
    for layer, count in zip((1, 3), rows, strict=True):
        expected |= {
            f"layers.{layer}.engram.embed.weight": (e4m3, (count, 64)),
            f"layers.{layer}.engram.embed.scale": (e8m0, (count, 2)),
            f"layers.{layer}.engram.wkv.weight": (e4m3, (96, 384)),
            f"layers.{layer}.engram.wkv.scale": (e8m0, (3, 12)),
            f"layers.{layer}.engram.q_weight": (bf16, (2, 32)),
            f"layers.{layer}.engram.k_weight": (bf16, (2, 32)),
        }
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == expected
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "text_config": {
            "engram_layer_ids": [1, 3], "engram_num_embeddings": rows, "engram_max_ngram_size": 4,
            "engram_vocab_size": 50, "engram_n_heads": 2, "engram_head_dim": 64, "engram_pad_token_id": 2,
            "engram_compressed_vocab_size": 40, "hidden_size": 32, "hc_mult": 2, "rms_norm_eps": 1e-20,
        }
    }  # fmt: skip
    every = torch.arange(rows[0]).view(1, -1, 1).expand(-1, -1, 6)
    values = bank.read_rows(1, every).wait(1)["engram"][0, :, :64]
    assert values.abs().amin(1).max() > 0, "rows that were never written have their initial values"
    codes, scales = CODECS["fp8"].encode(values)
    assert torch.equal(found["layers.1.engram.embed.weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found["layers.1.engram.embed.scale"].view(torch.uint8), scales.view(torch.uint8))
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_in_place(
    train: Train, tokenizer: Tokenizer, tmp_path: Path, dtype: torch.dtype
) -> None:
    bank, engrams = train()
    write_deepseek(bank, tmp_path / "out", engrams, tokenizer=tokenizer)
    again, read = read_deepseek(tmp_path / "out", dtype=dtype)
    assert again.in_files and again.codec == "fp8" and again.config == replace(CONFIG, init_std=0.0)
    assert again.addressing.layouts == bank.addressing.layouts
    stored = by_library(tmp_path / "out")
    for layer, engram in read.items():
        embeddings, exact = again.read(TOKENS).wait(layer)["engram"], bank.read(TOKENS).wait(layer)["engram"]
        assert embeddings.dtype == dtype
        assert ((embeddings - exact).abs() <= exact.abs().amax() * 2**-4).all()
        weight = stored[f"layers.{layer}.engram.wkv.weight"], stored[f"layers.{layer}.engram.wkv.scale"]
        assert torch.equal(engram.wkv.weight.float(), dequantise(*weight))
        streams = torch.randn(*TOKENS.shape, 2, 32).to(dtype)
        found, wanted = engram(streams, embeddings), engrams[layer](streams.float(), exact)
        torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.3)


def test_writing_what_was_read_gives_the_same_bytes(
    train: Train, vocab: CanonicalVocab, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bank, engrams = train("bf16")
    save_bank(bank, tmp_path / "memory")
    write_deepseek(bank, tmp_path / "one", engrams, tokenizer=tokenizer)
    write_deepseek(tmp_path / "memory", tmp_path / "two", engrams, tokenizer=tokenizer)
    for number, placement in enumerate(("disk", "host", "device")):
        again, read = read_deepseek(tmp_path / "one", vocab, placement=placement)
        write_deepseek(again, tmp_path / str(number), read, like=tmp_path / "one")
        assert contents(tmp_path / str(number)) == contents(tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert not list(tmp_path.glob("*.converting"))


@pytest.fixture
def release(tmp_path: Path, vocab: CanonicalVocab) -> Path:
    """A checkpoint that another program wrote: random codes and scales, other tensors, other keys, other files."""
    folder, bits = tmp_path / "release", torch.Generator().manual_seed(3)
    folder.mkdir()
    rows = [layout.rows for layout in MemoryBank(CONFIG, vocab).addressing.layouts.values()]

    def codes(*shape: int) -> Tensor:
        drawn = torch.randint(0, 127, shape, generator=bits) | torch.randint(0, 2, shape, generator=bits) << 7
        return drawn.to(torch.uint8).view(torch.float8_e4m3fn)

    def scales(*shape: int) -> Tensor:
        return torch.randint(110, 130, shape, generator=bits).to(torch.uint8).view(torch.float8_e8m0fnu)

    small: dict[str, Tensor] = {"layers.0.attn.wq.weight": torch.randn(3, 5), "head.weight": torch.randn(2, 2)}
    for number, (layer, count) in enumerate(zip((1, 3), rows, strict=True)):
        name = f"layers.{layer}.engram."
        table = {f"{name}embed.weight": codes(count, 64), f"{name}embed.scale": scales(count, 2)}
        save_file(table, folder / f"model-{number:05d}-of-00003.safetensors")
        weight = codes(96, 384)
        weight.view(torch.uint8)[:32, :32] = torch.randint(0, 119, (32, 32), generator=bits)  # 224 is the largest
        small |= {f"{name}wkv.weight": weight, f"{name}wkv.scale": scales(3, 12)}
        small |= {f"{name}{which}_weight": torch.randn(2, 32).bfloat16() for which in "qk"}
    save_file(small, folder / "model-00002-of-00003.safetensors")
    text = {
        "model_type": "deepseek_v41_text", "engram_layer_ids": [1, 3], "engram_num_embeddings": rows,
        "engram_max_ngram_size": 4, "engram_vocab_size": 50, "engram_n_heads": 2, "engram_head_dim": 64,
        "engram_pad_token_id": 2, "engram_compressed_vocab_size": 40, "hidden_size": 32, "hc_mult": 2,
        "rms_norm_eps": 1e-20, "image_token_id": 33,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": text}))
    return folder


def test_a_checkpoint_of_another_program_keeps_its_bytes(release: Path, vocab: CanonicalVocab, tmp_path: Path) -> None:
    bank, engrams = read_deepseek(release, vocab)
    write_deepseek(bank, tmp_path / "out", engrams, like=release)
    found = by_library(tmp_path / "out")
    before: dict[str, Tensor] = {}
    for file in release.glob("*.safetensors"):
        before |= {name: tensor for name, tensor in load_file(file).items() if ".engram." in name}
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    write_deepseek(bank, tmp_path / "anew", engrams)
    name = "layers.1.engram.wkv"
    anew = [by_library(tmp_path / "anew")[f"{name}.{part}"] for part in ("weight", "scale")]
    assert not torch.equal(anew[0].view(torch.uint8), before[f"{name}.weight"].view(torch.uint8))
    assert torch.equal(dequantise(*anew), dequantise(before[f"{name}.weight"], before[f"{name}.scale"]))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", release)]
    assert configs[0] == configs[1]
    engrams[1].wkv.weight.data.mul_(1.5)
    write_deepseek(bank, tmp_path / "changed", engrams, like=release)
    changed = by_library(tmp_path / "changed")
    assert torch.equal(
        changed["layers.3.engram.wkv.weight"].view(torch.uint8), before["layers.3.engram.wkv.weight"].view(torch.uint8)
    )
    weight = dequantise(changed["layers.1.engram.wkv.weight"], changed["layers.1.engram.wkv.scale"])
    torch.testing.assert_close(weight, engrams[1].wkv.weight.detach(), rtol=2**-4, atol=1e-2)


def test_rows_are_read_as_the_format_says(release: Path, vocab: CanonicalVocab) -> None:
    bank, _ = read_deepseek(release, vocab)
    table = load_file(release / "model-00001-of-00003.safetensors")
    codes, scale = (table[f"layers.3.engram.embed.{part}"].view(torch.uint8) for part in ("weight", "scale"))
    values = codes.view(torch.float8_e4m3fn).float() * (scale.int() - 127).float().exp2().repeat_interleave(32, 1)
    rows = torch.randint(len(codes), (1, 7, 6))
    assert torch.equal(bank.read_rows(3, rows).wait(3)["engram"], values[rows].flatten(2))


# -- what is refused ----------------------------------------------------------------------------------------------


def change(folder: Path, name: str, value: Callable[[Tensor], Tensor] | None) -> None:
    """Another tensor of this name, or none."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = tensors[name] if value is None else value(tensors[name]).clone()
            save_file({key: data for key, data in tensors.items() if value is not None or key != name}, file)


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "wkv.weight",
            None,
            "There is no tensor 'layers.3.engram.wkv.weight' in these files: give the folder with all",
        ),
        ("wkv.scale", None, r"There is no tensor 'layers\.3\.engram\.wkv\.scale'"),
        ("q_weight", None, r"There is no tensor 'layers\.3\.engram\.q_weight'"),
        ("embed.scale", None, r"has 'layers\.3\.engram\.embed\.weight' without 'layers\.3\.engram\.embed\.scale'"),
        ("embed.weight", None, r"release has tables of layers \[1\], and its config.json names layers \[1, 3\]"),
        (
            "wkv.weight",
            lambda data: data.float(),
            r"wkv\.weight' is F32 \[96, 384\], and config\.json asks for F8_E4M3",
        ),
        ("k_weight", lambda data: data[:1], r"k_weight' is BF16 \[1, 32\], and config\.json asks for BF16 \[2, 32\]"),
        ("wkv.scale", lambda data: data.view(torch.uint8), r"wkv\.scale' is U8 \[3, 12\], .* F8_E8M0 \[3, 12\]"),
        ("embed.scale", lambda data: data[:, :1], "are no FP8 rows with a scale for 32 numbers"),
    ],
)
def test_tensors_that_do_not_fit(
    release: Path, vocab: CanonicalVocab, name: str, value: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    change(release, f"layers.3.engram.{name}", value)
    with pytest.raises(ValueError, match=message):
        read_deepseek(release, vocab)


def test_tables_of_other_sizes_and_tensors_that_are_too_many(release: Path, vocab: CanonicalVocab) -> None:
    file = release / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "layers.1.engram.bias": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"holds 'layers\.1\.engram\.bias', which this format does not have"):
        read_deepseek(release, vocab)
    save_file(tensors, file)
    for part in ("weight", "scale"):
        change(release, f"layers.1.engram.embed.{part}", lambda data: data[:-1])
    with pytest.raises(ValueError, match=r"embed\.weight has 3\d\d rows of 64 numbers, and layer 1 of this"):
        read_deepseek(release, vocab)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("engram_head_dim", None, r"config\.json has no 'engram_head_dim': give the release's own"),
        ("engram_num_embeddings", [1, 2], r"says engram_num_embeddings \[1, 2\], and its other keys give \[3\d\d, "),
        ("engram_layer_ids", [1], r"says engram_num_embeddings"),
        ("rms_norm_eps", 1e-6, r"says rms_norm_eps 1e-06, and DeepSeek-V4.1's gate has 1e-20"),
        ("hc_mult", "2", r"EngramConfig\.branches is '2': give a whole number"),
        ("engram_compressed_vocab_size", 41, r"says engram_num|is 41, the tokenizer has 40 canonical ids"),
    ],
)
def test_configurations_that_do_not_fit(
    release: Path, vocab: CanonicalVocab, key: str, value: Any, message: str
) -> None:
    config = json.loads((release / "config.json").read_text())
    config["text_config"][key] = value
    if value is None:
        del config["text_config"][key]
    (release / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_deepseek(release, vocab)


def test_files_that_are_none(release: Path, vocab: CanonicalVocab, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"release has no tokenizer\.json, which says what tokens are alike: give vocab="
    ):
        read_deepseek(release)
    file = release / "model-00001-of-00003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"model-00001-of-00003\.safetensors is no whole safetensors file"):
        read_deepseek(release, vocab)
    file.write_bytes(data)
    (release / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json cannot be read .*: give the folder of a whole checkpoint"):
        read_deepseek(release, vocab)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({}, pickled / "pytorch_model.bin")
    for path in (pickled, pickled / "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is pickled, and reading it would run its code"):
            read_deepseek(path, vocab)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(fusion="paper"),
            "Memory 'engram' has fusion 'paper', and DeepSeek-V4.1 has 'deepseek-v4.1' always: train",
        ),
        (dict(seed=3), "has seed 3, and DeepSeek-V4.1 has 0 always: train one with seed=0"),
        (dict(conv_kernel=4), "has conv_kernel 4, and DeepSeek-V4.1 has 0 always"),
        (dict(bias=True), "has bias True, and DeepSeek-V4.1 has False always"),
        (dict(row_multiple=8), "has row_multiple 8, and DeepSeek-V4.1 has 1 always"),
        (dict(scheme="qwen_ple"), "has scheme 'qwen_ple', and DeepSeek-V4.1 has 'engram' always"),
        (dict(heads=(2, 2, 3)), r"has heads \(2, 2, 3\), and DeepSeek-V4.1 has one for all orders: train one with a"),
        (dict(row_dim=48), "has row_dim 48, and DeepSeek-V4.1 has a scale for 32 numbers: train one with a multiple"),
        (dict(hidden=40), "has hidden 40, and DeepSeek-V4.1 has a scale for 32 numbers"),
    ],
)
def test_memories_that_the_format_has_not(train: Train, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    bank, engrams = train(**fields)
    with pytest.raises(ValueError, match=message):
        write_deepseek(bank, tmp_path / "out", engrams)
    assert not list(tmp_path.iterdir())


def test_engrams_that_are_not_the_memorys(train: Train, tokenizer: Tokenizer, tmp_path: Path) -> None:
    bank, engrams = train()
    other = Engram(replace(CONFIG, hidden=64))
    with pytest.raises(
        ValueError, match=r"Engrams are given for layers \[1\], and the memory is at \[1, 3\]: give one"
    ):
        write_deepseek(bank, tmp_path / "out", {1: engrams[1]})
    with pytest.raises(
        ValueError, match="The Engram of layer 3 has hidden 64, and the memory 32: give the Engrams that"
    ):
        write_deepseek(bank, tmp_path / "out", {1: engrams[1], 3: other})
    other = Engram(replace(CONFIG, conv_kernel=4))
    with pytest.raises(ValueError, match="The Engram of layer 3 has conv_kernel 4, and the memory 0"):
        write_deepseek(bank, tmp_path / "out", {1: engrams[1], 3: other})
    engrams[3].key_weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="The Engram of layer 3 has NaN or infinity in key_weight"):
        write_deepseek(bank, tmp_path / "out", engrams)
    layouts = {layer: replace(layout, multipliers=(1, 3, 5, 7)) for layer, layout in bank.addressing.layouts.items()}
    with pytest.raises(ValueError, match="other multipliers or primes than its configuration gives, and DeepSeek"):
        write_deepseek(MemoryBank(CONFIG, bank.addressing.vocab, layouts=layouts), tmp_path / "out")
    with pytest.raises(ValueError, match="'engram' was made for another tokenizer: give that one"):
        write_deepseek(bank, tmp_path / "out", tokenizer=Tokenizer(WordLevel({"a": 0})))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is there already: give another folder"):
        write_deepseek(bank, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- what is stopped ----------------------------------------------------------------------------------------------


def test_a_killed_write_is_never_seen_and_goes_on(train: Train, tmp_path: Path) -> None:
    bank, engrams = train()
    save_bank(bank, tmp_path / "memory")
    write_deepseek(tmp_path / "memory", tmp_path / "whole", engrams)
    out = tmp_path / "out"
    read = OpenFile.read_into

    def slowly(*arguments: Any) -> None:
        time.sleep(0.03)
        read(*arguments)

    for delay in (0.0, 0.02, 0.05):
        process = os.fork()
        if process == 0:
            try:
                OpenFile.read_into = slowly  # type: ignore[method-assign]
                write_deepseek(tmp_path / "memory", out, engrams)
            finally:
                os._exit(70)
        while not (tmp_path / "out.converting").exists():
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert not out.exists()
    write_deepseek(tmp_path / "memory", out, engrams)
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "out.converting").exists()


def test_what_fails_from_an_open_bank_leaves_nothing(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, engrams = train()

    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space left"):
            write_deepseek(bank, tmp_path / "out", engrams)
    assert not list(tmp_path.iterdir())
    process = os.fork()
    if process == 0:
        try:
            monkeypatch.setattr(Path, "rename", lambda *paths: os.kill(os.getpid(), signal.SIGKILL))
            write_deepseek(bank, tmp_path / "out", engrams)
        finally:
            os._exit(70)
    os.waitpid(process, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out.converting"]
    for table in bank.tables:  # rows of a killed process are not gone on with: they have changed since
        store: Any = bank.source(table).store
        keys = make_keys(table.space, torch.arange(table.rows))
        count = torch.ones(table.rows, 1, dtype=torch.int32)
        planes = {"value": torch.zeros(table.rows, table.dim), "count": count}
        moments = {plane.name: torch.zeros(table.rows, plane.width) for plane in store.layout.planes}
        store.write(keys, bank.source(table).format.encode(keys, {**moments, **planes}))
    told: list[int] = []
    write_deepseek(bank, tmp_path / "out", engrams, tell=told.append)
    assert not by_library(tmp_path / "out")["layers.3.engram.embed.weight"].float().any()
    assert not (tmp_path / "out.converting").exists()
    assert sum(told) == sum(path.stat().st_size for path in (tmp_path / "out").glob("tables-*.safetensors"))
