"""What many GPUs would move: the calculation agrees with what is measured and with the code, and the page with it."""

from __future__ import annotations

import csv
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_engram.stores import Plane, RecordLayout, Shard

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
model: Any = import_module("scaling_model")
paper: Any = import_module("scaling_on_paper")

GIVEN = {name: one.value for name, one in model.inputs().items()}
TEXT = model.Text(GIVEN)


def scale(gpus: int) -> Any:
    return model.Scale(gpus, GIVEN, TEXT)


def test_the_page_and_its_csv_are_current() -> None:
    rewrite = "run: python benchmarks/scaling_on_paper.py --write"
    with open(paper.CSV, newline="") as file:
        lines = list(csv.reader(file))
    assert lines[1:] == paper.rows_of_csv(paper.scales()), rewrite
    assert paper.PAGE.read_text() == paper.page(paper.PAGE.read_text()), rewrite


def test_one_gpu_is_the_one_that_was_measured() -> None:
    one, measured = scale(1), model.latest("host-table-step")
    assert one.read == one.owned == pytest.approx(measured["distinct-rows"])
    bus, allowed = one.resources()["host bus"]
    assert bus == pytest.approx(measured["fetch-alone"] + measured["write-alone"], rel=0.05) and allowed == 1
    assert one.exchanged("id", "value", "gradient") == one.backbone == one.swap(384) == 0


def test_records_are_as_long_as_the_layout_makes_them() -> None:
    planes = (Plane("value", 64, "bf16"), Plane("count", 1, "int32"), Plane("moment", 1))
    assert RecordLayout(planes).nbytes == GIVEN["record"]


def test_curves_go_through_what_was_measured_and_fall() -> None:
    for order in model.ORDERS:
        for window in model.WINDOWS:
            assert TEXT.share(order, window) == pytest.approx(GIVEN[f"distinct-{order}-{window}"])
        shares = [TEXT.share(order, 2.0**power) for power in range(8, 28)]
        assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("gpus", [2, 8, 64, 512])
def test_rows_go_where_shards_send_them(gpus: int) -> None:
    rows = torch.randint(10**9, (100_000,), generator=torch.Generator().manual_seed(gpus)).unique()
    owners, mine = Shard(0, gpus).owners(rows), gpus // 2
    one = scale(gpus)
    assert float((owners != mine).double().mean()) == pytest.approx(one.off_rank, abs=0.01)
    assert float((owners // model.NODE != mine // model.NODE).double().mean()) == pytest.approx(one.off_node, abs=0.01)


@pytest.mark.parametrize("gpus", [2, 8, 64, 512])
def test_an_owner_reads_no_more_than_is_asked_and_no_less_than_one_rank_asks(gpus: int) -> None:
    one = scale(gpus)
    assert one.read / gpus < one.owned < one.read
    assert 0 < one.changed < 1
    mends = one.mends()
    assert mends["all three"] < min(time for name, time in mends.items() if name != "all three")
