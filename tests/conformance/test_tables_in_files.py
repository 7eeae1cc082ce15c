"""Tables in files give one memory under every placement: the rows of the files, whatever their layout and codec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from torch_engram.memory import MemoryBank, Tokens, open_bank, save_bank
from torch_engram.optim import RowAdam
from torch_engram.stores import CODECS
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.synthetic import synthesise
from torch_engram.stores.tensor_files import tensors_in

Make = Callable[..., MemoryBank]
Run = Callable[..., list[float]]
PLACEMENTS = ["disk", "disk-direct", "host", "device"]
QWEN = {"scheme": "qwen_ple", "row_multiple": 16, "layers": (1,)}
CASES = [
    ("deepseek-v4.1", "fp8", 1, {"max_ngram": 4, "row_dim": 64}), ("qwen4exp", "bf16", 7, QWEN),
    *[("plain", codec, 1, {"layers": (1,), "row_dim": 24}) for codec in ("fp32", "bf16", "fp16", "fp8", "int8")],
]  # fmt: skip


def make_files(folder: Path, bank: MemoryBank, layout: str, codec: str, shards: int) -> None:
    """A table for every layer of ``bank``, all in one folder."""
    folder.mkdir()
    for table in bank.tables:
        beside = folder / str(table.layer)
        synthesise(beside, layout, table.rows, table.dim, codec, layer=table.layer, shards=shards, seed=table.layer)
        for file in beside.iterdir():
            file.rename(folder / f"{table.layer}-{file.name}")


def rows_by_library(folder: Path) -> dict[int, Tensor]:
    """The rows of every layer in fp32."""
    found = {}
    for number, table in enumerate(find_tables(tensors_in(folder))):
        content: dict[str, Tensor] = {}
        for file in table.files:
            with safe_open(file, framework="pt") as opened:
                content |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
        names = (
            [table.name]
            if "*" not in table.name
            else [table.name.replace("*", str(i)) for i in range(len(table.values))]
        )
        parts = [torch.cat([content[name] for name in names])]
        if table.scales:
            parts.append(content[table.name.removesuffix("weight") + "scale"])
        found[table.layer if table.layer is not None else number + 1] = CODECS[table.codec].decode(tuple(parts))
    return found


def expected_embeddings(bank: MemoryBank, rows: dict[int, Tensor], tokens: Tokens, layer: int) -> Tensor:
    windows = bank.addressing.windows(tokens.ids, doc_start=tokens.doc_start, live=tokens.live)
    whole = rows[layer][bank.addressing.rows(windows, layer)[1]].flatten(2)
    return whole if tokens.live is None else whole * tokens.live[..., None]


@pytest.mark.parametrize("layout, codec, shards, config", CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_one_memory_under_every_placement(
    make_bank: Make, device: torch.device, tmp_path: Path, layout: str, codec: str, shards: int, config: dict[str, Any]
) -> None:
    make_files(tmp_path / "tables", make_bank(config), layout, codec, shards)
    rows = rows_by_library(tmp_path / "tables")
    for placement in PLACEMENTS:
        bank = make_bank(config, tables=tmp_path / "tables", placement=placement, device=device)
        assert bank.codec == codec and bank.optimizer is None
        for _ in range(3):
            shape = (int(torch.randint(1, 4, ())), int(torch.randint(1, 30, ())))
            ids = torch.randint(min(40, bank.addressing.raw_size), shape)
            tokens = Tokens(ids.to(device), torch.rand(shape).to(device) < 0.2, torch.rand(shape).to(device) < 0.8)
            memory, ahead = bank.read(tokens), bank.prefetch(tokens)
            on_host = Tokens(ids, *(mask.cpu() for mask in (tokens.doc_start, tokens.live) if mask is not None))
            for layer in bank.config.layers:
                expected = expected_embeddings(make_bank(config), rows, on_host, layer)
                assert torch.equal(memory.wait(layer)["engram"].cpu(), expected)
                assert torch.equal(ahead[0].wait(layer)["engram"].cpu(), expected)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "int8"])
def test_rows_are_loaded_in_another_codec(make_bank: Make, tmp_path: Path, codec: str) -> None:
    config = {"row_dim": 32}
    make_files(tmp_path / "tables", make_bank(config), "deepseek-v4.1", "fp8", 1)
    rows, tokens = rows_by_library(tmp_path / "tables"), Tokens(torch.randint(40, (3, 17)))
    for placement in ("host", "device"):
        bank = make_bank(config, tables=tmp_path / "tables", placement=placement, codec=codec)
        assert bank.codec == codec
        for layer, exact in rows.items():
            rounded = CODECS[codec].decode(CODECS[codec].encode(exact))
            expected = expected_embeddings(bank, {layer: rounded}, tokens, layer)
            assert torch.equal(bank.read(tokens).wait(layer)["engram"], expected)


@pytest.mark.parametrize("config", [{}, {"row_dim": (3, 5), "heads": (2, 3)}])
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_a_saved_memory_is_read_where_it_is(
    make_bank: Make, train: Run, every_record: Callable[..., list[Tensor]], tmp_path: Path, config: Any, codec: str
) -> None:
    bank = make_bank(config, optimizer=RowAdam, codec=codec, seed=3)
    batches = [[Tokens(torch.randint(5, (2, 3)))] for _ in range(6)]
    train(bank, batches[:3])
    save_bank(bank, tmp_path)
    train(bank, batches[3:4])
    save_bank(bank, tmp_path)  # in parts that list their rows
    assert any("changes" in file.name for file in tmp_path.rglob("*.safetensors"))
    tokens = torch.randint(60, (3, 40))  # most of whose rows were never written
    loaded = open_bank(tmp_path)
    for placement in ("disk", "disk-direct"):
        opened = open_bank(tmp_path, placement=placement)
        assert all(torch.equal(a, b) for a, b in zip(every_record(opened), every_record(loaded), strict=True))
        for layer in bank.config.layers:
            found = opened.read(tokens).wait(layer)["engram"]
            assert torch.equal(found, loaded.read(tokens).wait(layer)["engram"])
            assert torch.equal(found, bank.read(tokens).wait(layer)["engram"])
        save_bank(opened, tmp_path / placement)
        assert all(
            torch.equal(a, b)
            for a, b in zip(every_record(open_bank(tmp_path / placement)), every_record(loaded), strict=True)
        )
