"""Reads out of a table in the device's own memory, in one pass: the embeddings of rows that are fetched, to the bit.

A GPU reads so by itself; a CPU is told to, for the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.memory import MemoryBank, Tokens, WorkingSet, direct_reads
from torch_engram.memory.direct_reads import DirectFetch, DirectReads
from torch_engram.memory.lookups import Lookups
from torch_engram.memory.prepared import expanded
from torch_engram.memory.rows import TouchedRows
from torch_engram.memory.source import Source
from torch_engram.memory.tables import Table
from torch_engram.optim import RowAdam
from torch_engram.stores import FileRows, LoadedStore, RowFormat
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.synthetic import synthesise
from torch_engram.stores.tensor_files import tensors_in

Make = Callable[..., MemoryBank]
CONFIG = {"row_dim": 33, "heads": 3}
CODECS = ["fp32", "bf16", "fp16", "fp8", "int8"]
BOTH = {"cpu", "cuda"}


def rows_of(folder: Path, table: Table, codec: str) -> FileRows:
    """Random rows for a table, in files."""
    synthesise(folder, "plain", table.rows, table.dim, codec, layer=table.layer, seed=table.space)
    (named,) = find_tables(tensors_in(folder))
    return FileRows.of(named)


@pytest.fixture(scope="module")
def files(make_bank: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, tuple[Path, str]]]:
    """By codec, a table for every layer."""
    found: dict[str, dict[int, tuple[Path, str]]] = {}
    for codec in CODECS:
        for table in make_bank(CONFIG).tables:
            folder = tmp_path_factory.mktemp(codec) / "table"
            rows_of(folder, table, codec)
            found.setdefault(codec, {})[table.layer] = (folder / "table-00000.safetensors", "table.weight")
    return found


@pytest.fixture
def make_pair(make_bank: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[MemoryBank, MemoryBank]]:
    """Two banks that are alike but for how they read: directly, and by rows that are fetched."""

    def make(tables: object, **options: object) -> tuple[MemoryBank, MemoryBank]:
        banks = []
        for devices, kind in ((BOTH, DirectReads), ([], TouchedRows)):
            monkeypatch.setattr(direct_reads, "DEVICES", devices)
            banks.append(make_bank(CONFIG, tables=tables, placement="device", **options))
            assert banks[-1]._reads is kind
        return banks[0], banks[1]

    return make


def embeddings(step: WorkingSet, bank: MemoryBank) -> list[Tensor]:
    return [step[micro].wait(layer)["engram"].cpu() for micro in range(len(step)) for layer in bank.config.layers]


def some_tokens(shape: tuple[int, int], masked: bool, generator: torch.Generator) -> Tokens:
    masks = [torch.rand(shape, generator=generator) < share for share in (0.2, 0.7)]
    return Tokens(torch.randint(50, shape, generator=generator), masks[0], masks[1] if masked else None)


def require_alike(direct: MemoryBank, fetched: MemoryBank, *batches: Tokens) -> None:
    steps = [bank.prefetch(*batches) for bank in (direct, fetched)]
    found, expected = (embeddings(step, bank) for step, bank in zip(steps, (direct, fetched), strict=True))
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype == direct.dtype and torch.equal(got, want)
    assert steps[0].touched == steps[1].touched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS)
def test_embeddings_are_those_of_fetched_rows(
    make_pair: Callable[..., tuple[MemoryBank, MemoryBank]],
    files: dict[str, dict[int, tuple[Path, str]]],
    device: torch.device,
    codec: str,
    dtype: torch.dtype,
) -> None:
    banks = make_pair(files[codec], device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for many in (1, 3):
        for masked in ([False] * many, [True] * many, [number == 1 for number in range(many)]):
            batches = [some_tokens((2, 9 + number), mask, generator) for number, mask in enumerate(masked)]
            require_alike(*banks, *batches)


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["fp8", "int8", "bf16"])
def test_a_gpu_reads_ahead_what_it_fetches(
    make_pair: Callable[..., tuple[MemoryBank, MemoryBank]], files: dict[str, dict[int, tuple[Path, str]]], codec: str
) -> None:
    """As many reads under way as there are, large ones, of which some are dropped."""
    direct, fetched = make_pair(files[codec], device="cuda", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    asked = [some_tokens((4, 2000 + number), number % 2 == 0, generator) for number in range(24)]
    steps = [direct.prefetch(tokens) for tokens in asked]
    for number, tokens in enumerate(asked):
        if number % 3 == 1:
            steps[number].discard()
            continue
        for got, want in zip(
            embeddings(steps[number], direct), embeddings(fetched.prefetch(tokens), fetched), strict=True
        ):
            assert torch.equal(got, want)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8), st.booleans()), min_size=1, max_size=3),
    st.sampled_from(CODECS), st.integers(0, 99),
)  # fmt: skip
def test_micro_batches_of_any_shape(
    make_pair: Callable[..., tuple[MemoryBank, MemoryBank]],
    files: dict[str, dict[int, tuple[Path, str]]],
    shapes: list[tuple[int, int, bool]],
    codec: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [some_tokens((batch, length), masked, generator) for batch, length, masked in shapes]
    require_alike(*make_pair(files[codec]), *batches)


def test_nothing_is_fetched_and_dead_positions_are_zero(
    make_pair: Callable[..., tuple[MemoryBank, MemoryBank]],
    files: dict[str, dict[int, tuple[Path, str]]],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank, _ = make_pair(files["fp8"], device=device)
    monkeypatch.setattr(TouchedRows, "fetch", None)
    monkeypatch.setattr(LoadedStore, "fetch", None)
    live = torch.tensor([[True, False, True, True, False]])
    found = embeddings(bank.prefetch(Tokens(torch.tensor([[5, 5, 5, 7, 9]]), live=live)), bank)
    assert all(part[~live].eq(0).all() and part[live].ne(0).any(-1).all() for part in found)


def test_a_history_and_rows_that_somebody_else_hashed(
    make_pair: Callable[..., tuple[MemoryBank, MemoryBank]],
    files: dict[str, dict[int, tuple[Path, str]]],
    device: torch.device,
) -> None:
    direct, fetched = make_pair(files["bf16"], device=device)
    ids = torch.randint(50, (2, 12))
    histories = [bank.new_history() for bank in (direct, fetched)]
    for part in ids.split(5, 1):
        pair = zip((direct, fetched), histories, strict=True)
        found, expected = (embeddings(bank.prefetch(Tokens(part, history=history)), bank) for bank, history in pair)
        assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))
    for layer in direct.config.layers:
        rows = direct.addressing.lookup(ids)(layer)[1]
        got, want = (bank.read_rows(layer, rows).wait(layer)["engram"] for bank in (direct, fetched))
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="which has"):
        direct.read_rows(1, rows + direct.rows).wait(1)
    with pytest.raises(ValueError, match="outside this memory's vocabulary"):
        direct.prefetch(torch.full((2, 7), 60))[0].wait(1)
    require_alike(direct, fetched, Tokens(ids))


@pytest.mark.parametrize("heads", [(2, 3), (1, 1)])
def test_tables_of_several_widths_and_codecs(
    make_bank: Make, device: torch.device, tmp_path: Path, heads: tuple[int, int]
) -> None:
    """A layer has a table for each width: two layers, and a store for each of two kinds of records."""
    config = {"row_dim": (5, 64), "heads": heads}
    bank = make_bank(config, device=device)
    files = {table.space: rows_of(tmp_path / str(table.space), table, "fp8" if table.dim == 64 else "int8")
             for table in bank.tables}  # fmt: skip
    stores = {}
    for dim in (5, 64):
        own = {table.space: files[table.space] for table in bank.tables if table.dim == dim}
        layout = next(iter(own.values())).layout
        stores[dim] = Source(LoadedStore(own, layout, device), RowFormat(layout))
    generator = torch.Generator().manual_seed(3)
    batches = [some_tokens((2, 7), True, generator), some_tokens((3, 4), False, generator)]
    live = [tokens.live for tokens in batches]
    lookups = Lookups([bank._lookup(tokens) for tokens in batches], None)
    future: Future[Lookups] = Future()
    future.set_result(lookups)
    reads = [DirectReads(table, stores[table.dim]) for table in bank.tables]
    fetch = DirectFetch(reads, future, live, torch.bfloat16)
    fetch.begin()
    fetch.bring()
    found = fetch.place()
    for layer in bank.config.layers:
        expected = by_rows([table for table in bank.tables if table.layer == layer], stores, lookups, live)
        assert [part.shape[-1] for part in found[layer]] == [5 * heads[0] + 64 * heads[1]] * 2
        assert all(torch.equal(got, want) for got, want in zip(found[layer], expected, strict=True))


def by_rows(
    tables: Sequence[Table], stores: dict[int, Source], lookups: Lookups, live: Sequence[Tensor | None]
) -> list[Tensor]:
    """Embeddings of one layer, by rows that are fetched."""
    touched = [TouchedRows(table, stores[table.dim]) for table in tables]
    masks = [None if mask is None else mask.to(stores[5].store.table.device) for mask in live]  # type: ignore[attr-defined]
    for rows in touched:
        rows.fetch([lookup(tables[0].layer) for lookup in lookups.batches], masks)
    return [expanded(touched, micro, torch.bfloat16) for micro in range(len(masks))]


def test_only_loaded_tables_of_the_own_device_are_read_so(
    make_bank: Make, files: dict[str, dict[int, tuple[Path, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = files["fp8"]
    assert make_bank(CONFIG, tables=tables, placement="device")._reads is TouchedRows  # on a CPU
    monkeypatch.setattr(direct_reads, "DEVICES", BOTH)
    for options in (
        dict(tables=tables, placement="host"), dict(tables=tables, placement="disk"),
        dict(tables=tables, placement="device", cache="1MB"), dict(optimizer=RowAdam), dict(),
    ):  # fmt: skip
        assert make_bank(CONFIG, **options)._reads is not DirectReads
    counted = make_bank(CONFIG, placement=loaded_with_counts(tables))  # rows that were never written have values, too
    assert counted._reads is TouchedRows
    assert make_bank(CONFIG, tables=tables, placement="device")._reads is DirectReads


def loaded_with_counts(tables: dict[int, tuple[Path, str]]) -> Callable[..., LoadedStore]:
    def make(layout: object, spaces: dict[int, int], device: torch.device) -> LoadedStore:
        rows = {space: FileRows.of(find_tables(tensors_in(path))[0])
                for space, (path, _) in zip(spaces, tables.values(), strict=True)}  # fmt: skip
        return LoadedStore(rows, rows[0].layout, device)

    return make
