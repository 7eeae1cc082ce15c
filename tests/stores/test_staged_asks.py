"""Tables on disk asked by a GPU: the rows of a fetch, batch after batch, by way of one buffer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from disk_ways import tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.stores import DiskStore, disk, make_keys
from torch_engram.stores.asks import AskedStore, PlainAsk, new_ask
from torch_engram.stores.staged_asks import StagedAsk
from torch_engram.stores.synthetic import synthesise

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)


def a_store(folder: Path, direct: bool = False) -> DiskStore:
    """Two tables whose records have a gap, and whose scales lie apart."""
    for space, rows in ((0, 300), (3, 7)):
        synthesise(folder / str(space), "deepseek-v4.1", rows, 256, "fp8", seed=space)
    return DiskStore({space: tables(folder / str(space))[0] for space in (0, 3)}, direct)


@pytest.fixture(scope="module", params=[False, True], ids=["cached", "direct"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DiskStore:
    return a_store(tmp_path_factory.mktemp("tables"), request.param)


def send(ask: StagedAsk, keys: Tensor, device: str) -> None:
    """Ask for ``keys``, with others behind them that nobody asks for."""
    behind = torch.full((ask.capacity + 8 - len(keys),), -1)  # kernels round up what they leave room for
    ask.send(torch.cat((keys, behind)).to(device), torch.tensor([len(keys), 0], device=device))
    ask.sent()


@on_devices
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(batches=st.lists(st.lists(st.integers(0, 306), max_size=40), min_size=1, max_size=3))
def test_every_batch_has_its_rows(store: DiskStore, device: str, batches: list[list[int]]) -> None:
    ask = StagedAsk(store, 40, torch.device(device))
    assert not (ask.reads or ask.alone) and ask.records is not None
    for batch in batches:  # in any order, some more than once, of two tables
        rows = torch.tensor(batch, dtype=torch.int64)
        keys = torch.where(rows < 300, rows, make_keys(3, rows - 300))
        send(ask, keys, device)
        ask.read()
        found = ask.bring()
        assert found.data_ptr() == ask.records.data_ptr() or not batch
        assert found.device.type == device and torch.equal(found.cpu(), store.fetch(keys))
    with pytest.raises(AssertionError, match="the host has rows to bring"):
        ask.place(None, None)  # type: ignore[arg-type]


@on_devices
def test_a_batch_that_fails_is_told_and_the_next_one_is_whole(tmp_path: Path, device: str) -> None:
    store = a_store(tmp_path)
    ask, good = StagedAsk(store, 5, torch.device(device)), torch.tensor([7, 3])
    expected = store.fetch(good)
    for keys, message in (([1, 300], "Row 300 is not in"), ([1 << 40], "no table with number 1 here: ask for 0, 3")):
        send(ask, torch.tensor(keys), device)
        with pytest.raises(ValueError, match=message):
            ask.bring()
        send(ask, good, device)
        assert torch.equal(ask.bring().cpu(), expected)
    path = store.tables[0].files[0].path
    os.truncate(path, path.stat().st_size - 1)
    send(ask, good, device)
    with pytest.raises(OSError, match=rf"{path.name} was changed while it was in use"):
        ask.bring()


@on_devices
def test_few_rows_are_staged_and_many_are_fetched(store: DiskStore, device: str) -> None:
    where = torch.device(device)
    assert isinstance(store, AskedStore)
    assert isinstance(store.new_ask(disk.STAGED, where), StagedAsk)
    assert isinstance(store.new_ask(disk.STAGED + 1, where), PlainAsk)
    assert isinstance(new_ask(store, 3, where), PlainAsk if device == "cpu" else StagedAsk)


@pytest.mark.gpu
def test_what_is_staged_stays_until_it_is_copied(store: DiskStore) -> None:
    ask, batches = StagedAsk(store, 9, torch.device("cuda")), [torch.arange(at, at + 9) for at in (0, 50, 100)]
    found = []
    sends = torch.cuda.Stream()
    for keys in batches:
        with torch.cuda.stream(sends):
            send(ask, keys, "cuda")
        torch.cuda._sleep(10**7)  # the copy to the GPU waits
        found.append(ask.bring().clone())
    for records, keys in zip(found, batches, strict=True):
        assert torch.equal(records.cpu(), store.fetch(keys))


@pytest.mark.gpu
def test_an_ask_is_sent_from_a_graph(store: DiskStore) -> None:
    ask = StagedAsk(store, 9, torch.device("cuda"))
    keys, count = torch.zeros(9, dtype=torch.int64, device="cuda"), torch.tensor([9, 0], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ask.send(keys, count)
    for wanted in (torch.arange(9), torch.arange(20, 11, -1)):
        keys.copy_(wanted)
        graph.replay()
        ask.sent()
        assert torch.equal(ask.bring().cpu(), store.fetch(wanted))
