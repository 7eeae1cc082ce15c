"""Tables beyond 2**31 bytes and beyond 2**31 words: rows at both ends work, and memory follows the rows touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torch_engram.stores import DeviceStore, HostStore, Plane, RecordLayout, WritableStore, make_keys

MAKERS = {
    "device": lambda layout, spaces: DeviceStore(layout, spaces, "cpu"),
    "host": lambda layout, spaces: HostStore(layout, spaces, for_gpu=False),
}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("rows, width", [(2**24 + 3, 64), (2**31 + 9, 1)])  # past 2**31 bytes; past 2**31 words
def test_rows_at_the_far_end(name: str, rows: int, width: int) -> None:
    layout = RecordLayout((Plane("value", width), Plane("count", 1, "int32")))
    before = resident()
    store: WritableStore = MAKERS[name](layout, {0: 5, 1: rows})
    ends = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    records = torch.arange(5 * layout.nbytes).view(5, -1).to(torch.uint8)
    store.write(make_keys(1, ends), records)
    store.flush()
    assert torch.equal(store.fetch(make_keys(1, ends)), records)
    assert not store.fetch(make_keys(1, torch.tensor([2, rows // 2 - 1, rows - 3]))).any()
    assert not store.fetch(make_keys(0, torch.arange(5))).any()
    assert resident() - before < 100 * 2**20


@pytest.mark.gpu
def test_rows_at_the_far_end_of_a_device_table() -> None:
    layout = RecordLayout((Plane("value", 1), Plane("count", 1, "int32")))
    store = DeviceStore(layout, {0: 2**31 + 9}, "cuda")
    ends = make_keys(0, torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 8], device="cuda"))
    records = torch.arange(4 * layout.nbytes, device="cuda").view(4, -1).to(torch.uint8)
    store.write(ends, records)
    assert torch.equal(store.fetch(ends), records)
