"""Records out of a table and into it: the kernels against PyTorch, byte for byte."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_engram.stores import Plane, RecordLayout, make_keys
from torch_engram.stores.table import RecordTable
from torch_engram.stores.table_kernels import gather_triton, scatter_triton

KERNELS = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@settings(max_examples=30)
@given(
    st.integers(1, 70), st.lists(st.integers(1, 200), min_size=1, max_size=3), st.integers(0, 300),
    st.sampled_from([None, 1, 2, 5]), st.integers(0, 99),
)  # fmt: skip
def test_kernels_move_the_same_bytes(
    width: int, sizes: list[int], wanted: int, programs: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = RecordLayout((Plane("value", width, "fp32"), Plane("count", 1, "int32")))
    spaces = {7 * number + 2: rows for number, rows in enumerate(sizes)}
    twin = RecordTable(layout, spaces, torch.device("cpu"))
    twin.records.random_(generator=generator)
    every = torch.cat([make_keys(space, torch.arange(rows)) for space, rows in spaces.items()])
    keys = every[torch.randperm(len(every), generator=generator)[:wanted]]
    table, bases, changed = (x.to(KERNELS, copy=True) for x in (twin.words, twin.bases, twin._changed))
    found = gather_triton(table, bases, keys.to(KERNELS))
    assert torch.equal(found.cpu().view(torch.uint8), twin.gather(keys))
    new = torch.empty(len(keys), layout.nbytes, dtype=torch.uint8).random_(generator=generator)
    twin.scatter(keys, new)
    scatter_triton(table, bases, keys.to(KERNELS), new.view(torch.int64).to(KERNELS), changed, programs)
    assert torch.equal(table.cpu(), twin.words) and torch.equal(changed.cpu(), twin._changed)
