"""Lookups are timed on the rows of the files, on text that was not read before, and against limits that apply."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.addressing import CanonicalVocab
from torch_engram.bench import limits
from torch_engram.bench.cache_hits import Hits
from torch_engram.bench.excerpts import CHECKED, WARM_UP, Excerpts, Mode, modes
from torch_engram.bench.lookup_stand import LookupStand, choose_placements
from torch_engram.bench.lookup_tables import choose_layers, row_bytes, scaled, synthesise_layers, tables_at
from torch_engram.bench.lookups import LookupTimes, Read, _bytes_from_disk, drop_pages
from torch_engram.bench.page import LIMITS, LOOKUP_HEAD, hit_rows, lookup_cells
from torch_engram.config import PRESETS, EngramConfig
from torch_engram.data import TokenFile
from torch_engram.memory import Tokens
from torch_engram.stores import DiskStore
from torch_engram.stores.named_tables import NamedTable
from torch_engram.stores.tensor_files import TensorPlace

SMALL = EngramConfig.preset("deepseek-v4.1", vocab_size=40)


@pytest.fixture(autouse=True)
def few_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("_READS", 64), ("_REPEATS", 2), ("_TABLE_BYTES", 1 << 20)):
        monkeypatch.setattr(limits, name, few)
    monkeypatch.setattr(limits, "copy_rate", lambda _: 1e6)


def text_of(tokens: int, starts: list[int] | None = None) -> TokenFile:
    """Tokens that say where they are, below the vocabulary of 60."""
    return TokenFile(
        Path("text"), np.arange(tokens, dtype=np.uint16) % 60, np.array(starts or [0], np.int64), tokens, 60, 0, ""
    )


def a_table(rows: int, width: int = 256, layer: int | None = 1) -> NamedTable:
    return NamedTable(
        "t", "plain", layer, "fp8", width, (TensorPlace(Path("f"), "F8_E4M3", (rows, width), 0, rows * width),)
    )


@pytest.fixture
def make_stand(tmp_path: Path, make_vocab: Callable[..., CanonicalVocab]) -> Callable[..., LookupStand]:
    def make(**changes: Any) -> LookupStand:
        tables = synthesise_layers(tmp_path / "tables", SMALL, 6_000, None)
        return LookupStand(tables, SMALL, make_vocab(), torch.device("cpu"), **{"cold": True} | changes)

    return make


@pytest.fixture
def stand(make_stand: Callable[..., LookupStand]) -> LookupStand:
    return make_stand()


@given(
    preset=st.sampled_from(sorted(PRESETS)), rows=st.lists(st.integers(10_000, 10**8), min_size=1, max_size=3)
)  # fmt: skip
def test_a_preset_is_scaled_to_the_rows_of_every_layer(preset: str, rows: list[int]) -> None:
    tables = {3 * number: a_table(count) for number, count in enumerate(rows)}
    config, layouts = scaled(EngramConfig.preset(preset), tables)
    assert config.layers == tuple(tables) and config.row_dim == 256
    for layer, table in tables.items():
        used = sum(layouts[layer].flat_primes)
        assert layouts[layer].rows == table.rows and used <= table.rows
        assert used > 0.5 * min(rows)


def test_a_table_of_the_presets_own_size_keeps_its_primes() -> None:
    tables = {1: a_table(384_006_168), 14: a_table(384_016_682)}
    config, layouts = scaled(EngramConfig.preset("deepseek-v4.1"), tables)
    assert config == EngramConfig.preset("deepseek-v4.1")
    assert layouts[1].primes[0][0] == 16_000_057


def test_tables_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="47 rows are too few for 24 heads in 1 layers: give more"):
        scaled(SMALL, {1: a_table(47)})
    with pytest.raises(ValueError, match="several widths: choose layers that are alike"):
        scaled(SMALL, {1: a_table(10_000), 14: a_table(10_000, 128)})
    with pytest.raises(ValueError, match="no table of layer 2: choose of 1, 14"):
        choose_layers({1: a_table(9), 14: a_table(9)}, [2])


@pytest.mark.parametrize(
    "preset, codec, made", [("deepseek-v4.1", None, "fp8"), ("qwen-ple", None, "bf16"), ("demo", "int8", "int8")]
)
def test_tables_are_made_for_every_layer_and_found_again(
    tmp_path: Path, preset: str, codec: str | None, made: str
) -> None:
    config = EngramConfig.preset(preset)
    tables = synthesise_layers(tmp_path / "tables", config, 700, codec)
    assert tuple(tables) == config.layers
    for table in tables.values():
        assert (table.rows, table.width, table.codec) == (700, config.row_dim, made)
        assert table.nbytes == 700 * row_bytes(made, table.width)
    assert tables_at(tmp_path / "tables") == tables
    only = tables_at(tmp_path / "tables" / f"layer-{config.layers[0]}", config.layers[0])
    assert list(only) == [config.layers[0]]
    with pytest.raises(ValueError, match="is there already"):
        synthesise_layers(tmp_path / "tables", config, 700, codec)


@given(
    wanted=st.lists(
        st.builds(Mode, st.integers(1, 5), st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=4, unique=True
    ),
    before=st.sampled_from([0, 1, 50, 3000]),
    warm=st.sampled_from([0, 1, 50, 2500]),
    data=st.data(),
)
def test_no_token_is_read_twice_and_every_sequence_goes_on(
    wanted: list[Mode], before: int, warm: int, data: st.DataObject
) -> None:
    needed = before + sum(mode.tokens for mode in wanted)
    starts = data.draw(st.sets(st.integers(1, needed - 1)).map(sorted))
    text = TokenFile(Path("t"), np.arange(needed, dtype=np.uint32), np.array([0, *starts]), needed, needed, 0, "")
    excerpts, seen = Excerpts(text, wanted, warm), []
    assert excerpts.warm == min(before, warm)
    for ids, doc_start in excerpts.warming():
        assert ids.shape == doc_start.shape and len(ids) == 1
        assert doc_start.flatten().tolist() == [i in (0, *starts) for i in ids.flatten().tolist()]
        seen += ids.flatten().tolist()
    assert seen == list(range(before - excerpts.warm, before))
    for mode in wanted:
        reads = list(excerpts.reads(mode))
        assert len(reads) == mode.reads + WARM_UP
        for ids, doc_start in reads:
            assert ids.shape == doc_start.shape == (mode.sequences, mode.length)
            assert doc_start.flatten().tolist() == [i in (0, *starts) for i in ids.flatten().tolist()]
        whole = torch.cat([ids for ids, _ in reads], 1)
        assert (whole.diff(dim=1) == 1).all()
        seen += whole.flatten().tolist()
    assert sorted(seen) == list(range(before - excerpts.warm, needed))


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="has 100 tokens, and 120 would be read: lower --chunk"):
        Excerpts(text_of(100), [Mode(1, 24, 2)])


def test_modes() -> None:
    names = [mode.name for mode in modes(8192, 3, [1, 512], 5)]
    assert names == ["prefill-8192", "decode-1", "decode-512"]
    assert [mode.name for mode in modes(8192, 0, [4], 5)] == ["decode-4"]
    assert [mode.name for mode in modes(16, 2, [4], 0)] == ["prefill-16"]


def test_what_is_timed_adds_up(stand: LookupStand) -> None:
    wanted = [Mode(1, 16, 3), Mode(3, 1, 4)]
    excerpts = Excerpts(text_of(sum(mode.tokens for mode in wanted)), wanted)
    for placement in choose_placements([], "cpu"):
        for mode, one in zip(wanted, stand.time(placement, wanted, excerpts), strict=True):
            assert (one.placement, one.mode, len(one.reads)) == (placement, mode, mode.reads)
            assert one.rows == mode.sequences * mode.length * 24 * 2 and one.row_bytes == 264
            assert min(one.microseconds) <= one.p99 <= max(one.microseconds) and all(0 < x <= 1 for x in one.distinct)
            assert one.limit is stand.limits["memory-gather" if placement == "host" else "disk-rows"]
            assert len(lookup_cells(one)) == len(LOOKUP_HEAD)
            found = {measured.case: measured for measured in one.measurements()}
            assert list(found)[:5] == ["read", "p99", "rows", "delivered", "distinct"]
            rows, delivered = found["rows"].quantiles[1], found["delivered"].quantiles[1]
            assert delivered == pytest.approx(264e-9 * rows) and one.ratio == found["delivered"].ratio


def test_a_read_without_a_limit_or_a_count_has_dashes() -> None:
    one = LookupTimes("disk", Mode(1, 2, 1), [Read(100.0, 0.5, None)], 96, 264, None)
    assert one.ratio is None and lookup_cells(one)[-4:] == ["–", "–", "50 %", "–"]
    assert [measured.case for measured in one.measurements()] == ["read", "p99", "rows", "delivered", "distinct"]


def test_a_cache_is_filled_in_front_of_every_placement_but_device(make_stand: Callable[..., LookupStand]) -> None:
    stand, mode = make_stand(cache=64_000_000), Mode(1, 16, 3)
    for placement in ("disk", "disk-direct", "host"):
        few, all_of_them = (
            stand.time(placement, [mode], Excerpts(text_of(120 + mode.tokens), [mode], warm))[0].hits
            for warm in (0, 120)  # the text begins again after 60 tokens
        )
        assert few is not None and all_of_them is not None
        assert few.asked == all_of_them.asked == dict.fromkeys((2, 3, 4), 3 * 16 * 2)
        assert few.together < all_of_them.together == 1.0
    (one,) = stand.time("device", [mode], Excerpts(text_of(120 + mode.tokens), [mode], 120))
    assert one.hits is None and hit_rows([one]) == (["hits"], [])


def test_hits_are_those_of_timed_reads_alone(make_stand: Callable[..., LookupStand]) -> None:
    """Warm-up reads and a sample of one token again and again are found; the text that is timed has no n-gram twice."""
    stand, mode = make_stand(cache=64_000_000), Mode(1, 4, 5)
    tokens = np.concatenate((np.zeros(CHECKED + 4 * WARM_UP, np.uint16), np.arange(1, 21, dtype=np.uint16)))
    text = replace(text_of(len(tokens)), tokens=tokens)
    (one,) = stand.time("host", [mode], Excerpts(text, [mode]))
    found = {measured.case: measured.samples for measured in one.measurements()}
    assert list(found)[-4:] == ["hits", "hits-order-2", "hits-order-3", "hits-order-4"]
    assert found["hits"] == found["hits-order-2"] == found["hits-order-4"] == [0.0]
    assert hit_rows([one]) == (["hits", "2-grams", "3-grams", "4-grams"], [["host", "prefill-4", *["0 %"] * 4]])


def test_hits_between_two_counts() -> None:
    def counts(*numbers: int) -> dict[str, int]:
        return dict(zip(("hits", "repeats", "misses", "evictions", "overflow"), numbers, strict=True))

    before = {(1, 2): counts(5, 1, 4, 2, 0), (1, 3): counts(1, 1, 1, 0, 0), (14, 2): counts(0, 0, 0, 0, 0)}
    after = {(1, 2): counts(8, 2, 4, 2, 0), (1, 3): counts(1, 2, 4, 3, 3), (14, 2): counts(2, 0, 2, 0, 0)}
    hits = Hits.between(before, after)
    assert hits is not None and hits.asked == {2: 8, 3: 4} and hits.found == {2: 5, 3: 0}
    assert hits.rates == {2: 5 / 8, 3: 0.0} and hits.together == 5 / 12
    assert Hits.between({}, {}) is None


def test_a_bank_with_other_rows_is_not_timed(stand: LookupStand, tmp_path: Path) -> None:
    other = synthesise_layers(tmp_path / "other", SMALL, 6_000, None)
    stand.tables[14] = other[1]  # the rows of another layer
    taken: list[object] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="of layer 14 are not those"):
        patch.setattr(Read, "take", lambda *_: taken.append(1))
        stand.time("disk", [Mode(1, 8, 1)], Excerpts(text_of(60), [Mode(1, 8, 1)]))
    assert not taken


def test_dropped_pages_come_from_the_disk_again(stand: LookupStand, tmp_path: Path) -> None:
    bank, tokens = stand.bank("disk"), Tokens(torch.arange(40)[None])
    first, expected = Read.take(bank, tokens), bank.read(tokens).wait(1)["engram"]
    warm = Read.take(bank, tokens)
    drop_pages(bank)
    cold = Read.take(bank, tokens)
    assert torch.equal(bank.read(tokens).wait(1)["engram"], expected)
    assert first.distinct == warm.distinct == cold.distinct
    if not _counts_what_comes_from_the_disk(tmp_path / "file"):
        pytest.skip("these files are in memory, or the system does not count what comes from the disk")
    assert warm.from_disk == 0 and cold.from_disk is not None and cold.from_disk > 0


def test_pages_are_dropped_behind_a_cache_too(make_stand: Callable[..., LookupStand]) -> None:
    bank = make_stand(cache=4_000_000).bank("disk")
    dropped: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiskStore, "drop_pages", lambda store: dropped.append(store))
        drop_pages(bank)
    assert len(dropped) == 1 and isinstance(dropped[0], DiskStore)


def _counts_what_comes_from_the_disk(path: Path) -> bool:
    path.write_bytes(bytes(1 << 20))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = _bytes_from_disk()
        file.read()
        return before is not None and before != _bytes_from_disk()


def test_limits_of_this_machine(stand: LookupStand, monkeypatch: pytest.MonkeyPatch) -> None:
    files = list(stand.files.values())
    found = {one.case: one for one in limits.limits(files, torch.device("cpu"))}
    assert all(min(one.samples) > 0 and one.case in LIMITS for one in found.values())
    assert set(found) == {"memory-copy", "memory-gather", "disk-4k", "disk-4k-reads", "disk-rows"}

    def refuse(_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(limits, "open_direct", refuse)
    assert {one.case for one in limits.limits(files, torch.device("cpu"))} == {"memory-copy", "memory-gather"}


@pytest.mark.parametrize(
    "placement, device, cold, name",
    [
        ("disk-direct", "cuda", False, "disk-rows"), ("disk", "cpu", True, "disk-rows"),
        ("disk", "cpu", False, "memory-gather"), ("disk", "cuda", False, "bus-copy"),
        ("host", "cuda", True, "bus-copy"), ("device", "cuda", False, "gpu-gather"),
        ("host", "cpu", True, "memory-gather"),
    ],
)  # fmt: skip
def test_each_placement_has_its_limit(placement: str, device: str, cold: bool, name: str) -> None:
    assert limits.limit_of(placement, torch.device(device), cold) == name and name in LIMITS


def test_placements() -> None:
    assert choose_placements([], "cpu") == ["disk", "disk-direct", "host"]
    assert choose_placements([], "cuda") == ["disk", "disk-direct", "host", "host-shared", "device"]
    assert choose_placements(["host", "disk", "host"], "cpu") == ["host", "disk"]
    with pytest.raises(ValueError, match="no placement 'dsk': did you mean 'disk'"):
        choose_placements(["dsk"], "cpu")
