"""Every store by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from disk_ways import WAYS, read_by

from torch_engram.stores import DeviceStore, DiskStore, HostStore, RecordLayout, WritableStore

StoreOf = Callable[[RecordLayout, Mapping[int, int]], WritableStore]

STORES = [
    "device", "host",
    pytest.param("device-cuda", marks=pytest.mark.gpu), pytest.param("host-pinned", marks=pytest.mark.gpu),
]  # fmt: skip


@pytest.fixture(params=STORES)
def store_of(request: pytest.FixtureRequest) -> StoreOf:
    def make(layout: RecordLayout, spaces: Mapping[int, int]) -> WritableStore:
        match request.param:
            case "device":
                return DeviceStore(layout, spaces, "cpu")
            case "device-cuda":
                return DeviceStore(layout, spaces, "cuda")
            case "host":
                return HostStore(layout, spaces, pinned=False)
            case _:
                return HostStore(layout, spaces, pinned=True)

    return make


@pytest.fixture
def key_device(request: pytest.FixtureRequest) -> torch.device:
    """Where the computing side of the store under test lives."""
    name = request.node.callspec.params["store_of"]
    return torch.device("cuda" if name in ("device-cuda", "host-pinned") else "cpu")


@pytest.fixture(params=WAYS)
def disk_store_of(request: pytest.FixtureRequest) -> Callable[..., DiskStore]:
    """A read-only store of tables in files, in every way that they are read."""
    return partial(read_by, request.param)
