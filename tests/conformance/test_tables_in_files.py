"""Tables in files give one memory under every placement: the rows of the files, whatever their layout and codec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from torch_engram.memory import MemoryBank, Tokens, direct_reads, open_bank, save_bank
from torch_engram.optim import RowAdam
from torch_engram.stores import (
    CODECS,
    CachedStore,
    DeviceStore,
    DiskStore,
    FileRows,
    HostStore,
    LoadedStore,
    Plane,
    RecordLayout,
    SharedHostStore,
    Store,
    WritableStore,
    cached,
    make_keys,
)
from torch_engram.stores.codecs import VALUE_CODECS
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.slots import WAYS
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


Parts = tuple[Tensor, ...]


def parts_by_library(folder: Path) -> dict[int, tuple[str, Parts]]:
    """The codec of every layer's table, and what its files hold: values, and scales where there are any."""
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
        found[table.layer if table.layer is not None else number + 1] = table.codec, tuple(parts)
    return found


def rows_by_library(folder: Path) -> dict[int, Tensor]:
    """The rows of every layer in fp32."""
    return {layer: CODECS[codec].decode(parts) for layer, (codec, parts) in parts_by_library(folder).items()}


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


# -- every store, codec and cache --------------------------------------------------------------------------------------

WIDTH = 33
ONE_LAYER = {"layers": (1,), "row_dim": WIDTH}
STORES = [*PLACEMENTS, "writable-host", "writable-device"]
CACHES = ["none", "tiny", "large"]


@dataclass(frozen=True)
class Files:
    """A table of one codec in a file, and what is in it, read by the library alone."""

    folder: Path
    codec: str
    parts: Parts
    reads: list[tuple[Tokens, Tensor]]
    """Tokens, and the embeddings that their rows make."""

    def records(self, layout: RecordLayout) -> Tensor:
        """All rows, encoded: the components side by side, and a count of 1 where a record has one."""
        records = layout.empty(len(self.parts[0]))
        parts = iter(self.parts)
        for field in layout.fields:
            layout.view(records, field).copy_(next(parts) if field.plane == "value" else torch.ones(1))
        return records


@pytest.fixture(scope="module", params=VALUE_CODECS)
def files(request: pytest.FixtureRequest, make_bank: Make, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder, bank = tmp_path_factory.mktemp(request.param) / "tables", make_bank(ONE_LAYER)
    make_files(folder, bank, "plain", request.param, 1)
    generator, reads = torch.Generator().manual_seed(7), []
    for shape in ((2, 30), (1, 1), (3, 25), (2, 30)):
        masks = [torch.rand(shape, generator=generator) < share for share in (0.2, 0.8)]
        tokens = Tokens(torch.randint(40, shape, generator=generator), *masks)
        reads.append((tokens, expected_embeddings(bank, rows_by_library(folder), tokens, 1)))
    ((codec, parts),) = parts_by_library(folder).values()
    return Files(folder, codec, parts, [*reads, reads[0]])


def size_of(cache: str, least: int) -> int | None:
    """Bytes of a cache whose least size is one set for each kind of entry."""
    return {"none": None, "tiny": least, "large": 100 * least}[cache]


def require_counts(cache: str, counts: Mapping[Any, Mapping[str, int]]) -> None:
    """A tiny cache has thrown entries out all the time, a large one has kept what it was asked for again."""
    total = {name: sum(line[name] for line in counts.values()) for name in ("hits", "evictions", "overflow")}
    lost = total["evictions"] + total["overflow"]
    assert {"none": not counts, "tiny": lost > 50, "large": total["hits"] > 50 and not lost}[cache], total


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("where", [*STORES, "directly"])
def test_embeddings_of_every_store_codec_and_cache(
    make_bank: Make, files: Files, device: torch.device, where: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_reads, "DEVICES", ["cpu", "cuda"] if where == "directly" else [])
    writable = where.startswith("writable-")
    rows: dict[str, Any] = {"codec": files.codec} if writable else {"tables": files.folder}
    placement = "device" if where == "directly" else where.removeprefix("writable-")
    record = RecordLayout((Plane("value", WIDTH, files.codec), Plane("count", 1, "int32")))
    size = size_of(cache, 2 * WAYS * (2 * record.nbytes + 12))  # two orders of two heads
    bank = make_bank(ONE_LAYER, placement=placement, cache=size, device=device, **rows)
    (table,) = bank.tables
    store = bank.source(table).store
    if isinstance(store, WritableStore):
        store.write(make_keys(0, torch.arange(table.rows)).to(device), files.records(store.layout).to(device))
        bank.flush()
    assert isinstance(store, WritableStore) == writable
    for tokens, expected in files.reads:
        assert torch.equal(bank.read(tokens).wait(1)["engram"].cpu(), expected)
    require_counts(cache, bank.cache_counts())


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("where", STORES)
def test_records_of_every_store_codec_and_cache(files: Files, where: str, cache: str) -> None:
    """By row, as the rows of a memory that is trained are cached."""
    (named,) = find_tables(tensors_in(files.folder))
    tables, cpu = {0: FileRows.of(named)}, torch.device("cpu")
    layout = tables[0].layout
    store: Store
    match where:
        case "host":
            store = SharedHostStore(tables, layout)
        case "device":
            store = LoadedStore(tables, layout, cpu)
        case "writable-host":
            store = HostStore(layout, {0: named.rows}, for_gpu=False)
        case "writable-device":
            store = DeviceStore(layout, {0: named.rows}, cpu)
        case _:
            store = DiskStore(tables, direct=where == "disk-direct")
    size = size_of(cache, WAYS * (layout.nbytes + 12))
    front = store if size is None else cached(store, size, cpu)
    every = files.records(layout)
    if isinstance(front, WritableStore):
        for rows in torch.randperm(named.rows).split(17):
            front.write(rows, every[rows])
        front.flush()
    for _ in range(20):
        rows = torch.randint(named.rows, (int(torch.randint(1, 40, ())),)).unique()
        assert torch.equal(front.fetch(rows), every[rows])
    if isinstance(front, CachedStore):
        require_counts(cache, front.counts())


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
