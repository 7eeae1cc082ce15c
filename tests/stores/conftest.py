"""Every store by name, alone and behind caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from disk_ways import WAYS, read_by

from torch_engram.stores import (
    DeviceStore,
    DiskStore,
    DiskTable,
    FileRows,
    HostStore,
    LoadedStore,
    RecordLayout,
    SharedHostStore,
    Store,
    WritableCachedStore,
    WritableStore,
    shared_memory,
    slots,
)

ReaderOf = Callable[[Mapping[int, FileRows]], Store]
StoreOf = Callable[[RecordLayout, Mapping[int, int]], WritableStore]

STORES = [
    "device", "host", "disk",
    pytest.param("device-cuda", marks=pytest.mark.gpu), pytest.param("host-pinned", marks=pytest.mark.gpu),
    pytest.param("disk-cuda", marks=pytest.mark.gpu),
]  # fmt: skip
ON_GPU = ("device-cuda", "host-pinned", "disk-cuda")


@pytest.fixture(params=["uncached", "tiny", "large"])
def cache(request: pytest.FixtureRequest) -> str:
    """How large a cache is in front: tiny has one set for every space."""
    name: str = request.param
    return name


@pytest.fixture(params=STORES)
def store_of(request: pytest.FixtureRequest, cache: str, tmp_path_factory: pytest.TempPathFactory) -> StoreOf:
    def make(layout: RecordLayout, spaces: Mapping[int, int]) -> WritableStore:
        store = alone(layout, spaces)
        if cache == "uncached":
            return store
        least = len(spaces) * slots.WAYS * (layout.nbytes + 12)
        device = "cuda" if request.param in ON_GPU else "cpu"
        return WritableCachedStore(store, least if cache == "tiny" else 40 * least, device)

    def alone(layout: RecordLayout, spaces: Mapping[int, int]) -> WritableStore:
        match request.param:
            case "device":
                return DeviceStore(layout, spaces, "cpu")
            case "device-cuda":
                return DeviceStore(layout, spaces, "cuda")
            case "disk" | "disk-cuda":
                return DiskTable(layout, spaces, tmp_path_factory.mktemp("rows"), staging=0)
            case "host":
                return HostStore(layout, spaces, for_gpu=False)
            case _:
                return HostStore(layout, spaces, for_gpu=True)

    return make


@pytest.fixture
def key_device(request: pytest.FixtureRequest) -> torch.device:
    """Where the computing side of the store under test lives."""
    return torch.device("cuda" if request.node.callspec.params["store_of"] in ON_GPU else "cpu")


@pytest.fixture(params=WAYS)
def disk_store_of(request: pytest.FixtureRequest) -> Callable[..., DiskStore]:
    """A read-only store of tables in files, in every way that they are read."""
    return partial(read_by, request.param)


READERS = ["disk", "disk-direct", "loaded", "host-shared", "host-own"]


@pytest.fixture(params=READERS)
def reader_of(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReaderOf:
    """Every store of tables in files by name."""
    monkeypatch.setattr(shared_memory, "FOLDERS", (tmp_path,) if request.param == "host-shared" else ())

    def make(tables: Mapping[int, FileRows]) -> Store:
        layout = next(iter(tables.values())).layout
        match request.param:
            case "loaded":
                return LoadedStore(tables, layout, torch.device("cpu"))
            case "host-shared":
                return SharedHostStore(tables, layout)
            case "host-own":
                with pytest.warns(UserWarning, match="cannot share"):
                    return SharedHostStore(tables, layout)
            case _:
                return DiskStore(tables, direct=request.param == "disk-direct")

    return make
