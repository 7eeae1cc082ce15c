"""Where tables fit and what lookups cost: every number follows from the machine, the memory and the text."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.addressing import Addressing
from torch_engram.analysis import machine
from torch_engram.analysis.hit_rates import WAYS, number_ngrams
from torch_engram.analysis.machine import Machine, free_disk, free_hbm, free_ram
from torch_engram.analysis.placement import Demand, Tables, cost, demands_of_text, demands_shipped, placements
from torch_engram.config import PRESETS, EngramConfig

V41 = Tables(EngramConfig.preset("deepseek-v4.1"), "fp8")
BIG = Machine(hbm=80 * 10**9, ram=256 * 10**9, disk=2 * 10**12)


def test_sizes_of_the_published_memory():
    assert V41.records == (264,) * 3 and V41.rows == (16,) * 3 and V41.components == 2
    assert V41.nbytes == (384_006_168 + 384_016_682) * 264
    assert Tables(EngramConfig.preset("paper-40b"), "bf16").entries == (2 * 8 * 160,) * 2


def test_costs_are_the_written_formulas():
    demand = Demand(512, (0.9, 1.0, 1.0), (0.25, 0.5, 0.5))
    entry = 16 * 264
    device, host, disk = (cost(name, V41, BIG, demand) for name in ("device", "host", "disk"))
    gather = 3 * entry / 1283e9
    assert device.token_us == pytest.approx(1e6 * gather) and device.bus_bytes == device.disk_bytes == 0
    assert host.bus_bytes == pytest.approx(1.25 * entry) and host.disk_reads == 0
    assert host.token_us == pytest.approx(1e6 * (gather + 1.25 * entry / 33.5e9))
    assert disk.disk_reads == pytest.approx(1.25 * 16 * 2) and disk.disk_bytes == pytest.approx(40 * 4096)
    assert disk.token_us == pytest.approx(1e6 * (gather + 40 / 47_000 + 1.25 * entry / 54.9e9))
    assert all(one.step_us == pytest.approx(512 * one.token_us) for one in (device, host, disk))


def test_one_read_is_waited_for_by_a_step_that_reads_at_all():
    quick = Machine(hbm=10**9, ram=0, disk=0, disk_iops=1e12, disk_latency=1e-3)
    for step, fetched, waits in ((1, 0.5, 0.5), (1, 3.0, 1.0), (8, 0.1, 0.8), (8, 1.0, 1.0)):
        found = cost("disk", V41, quick, Demand(step, (1, 1, 1), (fetched, 0, 0)))
        assert found.step_us == pytest.approx(1000 * waits, rel=0.01)


def test_without_a_gpu_nothing_crosses_a_bus():
    demand = Demand(1, (1.0, 1.0, 1.0), (0.5, 0.5, 0.5))
    host = cost("host", V41, Machine(hbm=0, ram=1, disk=1), demand)
    assert host.bus_bytes == 0 and host.token_us == pytest.approx(1e6 * 3 * 16 * 264 / 33.5e9)
    disk = cost("disk", V41, Machine(hbm=0, ram=1, disk=1), demand)
    assert disk.bus_bytes == 0 and disk.disk_reads == pytest.approx(1.5 * 32)


@pytest.mark.parametrize("machine, cache, fitting", [
    (BIG, 8 * 10**9, {"host", "disk"}),
    (BIG, 81 * 10**9, set()),
    (Machine(hbm=210 * 10**9, ram=0, disk=0), 0, {"device"}),
    (Machine(hbm=0, ram=10**9, disk=None), 10**9, {"disk"}),
    (Machine(hbm=0, ram=210 * 10**9, disk=0), 10**15, {"host"}),
    (Machine(hbm=0, ram=10**9, disk=210 * 10**9), 10**9, {"disk"}),
    (Machine(hbm=0, ram=10**9, disk=210 * 10**9), 2 * 10**9, set()),
])  # fmt: skip
def test_what_fits(machine, cache, fitting):
    demands, _ = demands_shipped(V41, cache)
    found = placements(V41, cache, machine, demands)
    assert [one.name for one in found] == ["device", "host", "disk"]
    assert {one.name for one in found if one.fits} == fitting


@given(st.lists(st.integers(0, 10**14), min_size=2, max_size=6))
def test_a_larger_cache_never_fetches_more_by_the_curves_that_ship(caches):
    for preset in PRESETS:
        tables = Tables(EngramConfig.preset(preset), "bf16")
        found = [demands_shipped(tables, cache)[0] for cache in sorted(caches)]
        for way in WAYS:
            for order in range(len(tables.config.orders)):
                fetched = [one[way].fetched[order] for one in found]
                assert fetched == sorted(fetched, reverse=True)
                assert all(0 <= one[way].hit_rates[order] < 1 for one in found)


def test_the_curves_that_ship_are_those_of_the_csv():
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "hit-rates.csv"
    with open(path, newline="") as file:
        rows = {row["case"]: float(row["value"]) for row in csv.DictReader(file)}
    for gigabytes in (0, 0.1, 1, 8, 16):
        demands, _ = demands_shipped(V41, int(gigabytes * 1e9))
        for way, demand in demands.items():
            moved = cost("host", V41, BIG, demand).bus_bytes
            assert moved == pytest.approx(rows[f"{way}-warmed-bytes-all-{gigabytes}GB"], rel=0.01), (way, gigabytes)


def test_orders_without_a_curve_are_refused():
    with pytest.raises(ValueError, match="No curve comes with orders up to 5: give --text"):
        demands_shipped(Tables(EngramConfig.preset("deepseek-v4.1", max_ngram=5), "fp8"), 0)


def test_a_text_of_one_sentence_over_and_over_is_all_found(make_vocab):
    config = EngramConfig(layers=(1,), hidden=8, vocab_size=40, rows_per_head=50, heads=2, row_dim=4)
    tokens = np.tile(np.arange(30), 200)
    ngrams = number_ngrams(Addressing(config, make_vocab(60, 40)), tokens, np.array([0]))
    tables = Tables(config, "fp32")
    for way, demand in demands_of_text(ngrams, tables, 10**6).items():
        assert demand.hit_rates == pytest.approx((1, 1), abs=0.02) and demand.step == WAYS[way].tokens
    for demand in demands_of_text(ngrams, tables, 0).values():
        assert demand.hit_rates == (0, 0)


def test_this_machine():
    assert 0 < free_ram() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free_disk(Path("/")) == pytest.approx(shutil.disk_usage("/").free, rel=0.2)
    assert free_hbm() >= 0
    with pytest.raises(ValueError, match="disk iops is 0: give a number above 0"):
        Machine(1, 1, 1, disk_iops=0)


def test_a_system_that_does_not_say(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: None)
    with pytest.raises(ValueError, match="give --ram"):
        free_ram()
