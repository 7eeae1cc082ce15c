"""The kernels on records against RowFormat and counter: through the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.stores import DecodedRows, Plane, RecordLayout, RowFormat, decoded, make_keys
from torch_engram.stores.counter import counter_bits, seed_term
from torch_engram.stores.counter_kernels import counter_bits as counter_bits_triton
from torch_engram.stores.counter_kernels import draw_base
from torch_engram.stores.record_kernels import store_value

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNT = Plane("count", 1, "int32")
SEEDS = st.sampled_from([0, 1, 7, 2**31, 2**63 - 1, 2**63, 12345678901234567])


pytestmark = pytest.mark.usefixtures("in_place")


@triton.jit
def _bits(keys, draws, out, rows, dim, seed_term, PLANE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    row, column = tl.arange(0, ROWS).to(tl.int64), tl.arange(0, DIM).to(tl.int64)
    key, draw = tl.load(keys + row, mask=row < rows, other=0), tl.load(draws + row, mask=row < rows, other=0)
    bits = counter_bits_triton(draw_base(key, draw, seed_term)[:, None], column[None], PLANE)
    tl.store(out + row[:, None] * dim + column[None], bits, mask=(row < rows)[:, None] & (column < dim)[None])


@triton.jit
def _store(values, out, keys, counts, rows, dim, seed_term, PLANE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    row, column = tl.arange(0, ROWS).to(tl.int64), tl.arange(0, DIM).to(tl.int64)
    inside = (row < rows)[:, None] & (column < dim)[None]
    place = row[:, None] * dim + column[None]
    key, count = tl.load(keys + row, mask=row < rows, other=0), tl.load(counts + row, mask=row < rows, other=0)
    number = tl.load(values + place, mask=inside, other=0.0)
    store_value(out, place, number, inside, key, count, column, seed_term, PLANE, True)


def keys_of(rows: int, device: torch.device = DEVICE) -> Tensor:
    return make_keys(5, torch.randint(2**40, (rows,)).unique()).to(device)


@settings(max_examples=25)
@given(SEEDS, st.integers(1, 20), st.integers(1, 70), st.sampled_from([0, 1, 3]))
def test_bits_are_the_counters(seed: int, rows: int, dim: int, plane: int) -> None:
    keys = keys_of(rows)
    draws = torch.randint(-1, 2**31 - 1, (len(keys),), device=DEVICE)
    out = torch.zeros(len(keys), dim, dtype=torch.int64, device=DEVICE)
    _bits[(1,)](keys, draws, out, len(keys), dim, seed_term(seed), PLANE=plane, ROWS=32, DIM=128)
    assert torch.equal(out, counter_bits(seed, keys, draws, dim, plane))


@pytest.mark.parametrize("plane", [0, 2])
def test_rounding_takes_the_codecs_bits(plane: int) -> None:
    """The same fp32 number, key, count and column give the same bf16, whatever the number."""
    keys = keys_of(30)
    values = torch.randint(-(2**31), 2**31 - 1, (len(keys), 33), device=DEVICE).int().view(torch.float32)
    values[~(values.abs() >= 2.0**-126)] = 1.5  # the interpreter has a NaN and small numbers of its own
    values[0, :4] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    counts = torch.randint(1, 2**31 - 1, (len(keys), 1), device=DEVICE).int()
    layout = RecordLayout((*(Plane(f"p{i}", 33) for i in range(plane)), Plane("value", 33, "bf16"), COUNT))
    row_format, others = RowFormat(layout, seed=11), {f"p{i}": values for i in range(plane)}
    expected = row_format.encode(keys, {**others, "value": values, "count": counts})
    out = torch.zeros(len(keys), 33, dtype=torch.bfloat16, device=DEVICE)
    _store[(1,)](values, out, keys, counts, len(keys), 33, seed_term(11), PLANE=plane, ROWS=32, DIM=64)
    assert torch.equal(out.view(torch.int16), layout.view(expected, layout.fields[plane]).view(torch.int16))


def table(width: int, codec: str, seed: int = 3, std: float = 0.5) -> RowFormat:
    planes = Plane("value", width, codec), COUNT, Plane("moment", width)
    return RowFormat(RecordLayout(planes), seed, std)


def some_records(row_format: RowFormat, rows: int) -> Tensor:
    """Every third row never written; padding is poisoned."""
    layout = row_format.layout
    records = torch.randint(256, (rows, layout.nbytes), dtype=torch.uint8)
    value, count, moment = layout.fields
    layout.view(records, value).copy_(torch.randn(rows, value.component.width))
    layout.view(records, count).copy_(torch.arange(rows)[:, None] % 3)
    layout.view(records, moment).copy_(torch.rand(rows, value.component.width))
    for field in (value, moment):
        layout.view(records, field)[::3] = 0
    return records.to(DEVICE)


@settings(max_examples=15)
@given(st.integers(0, 40), st.integers(1, 70), st.sampled_from([0.0, 0.5]))
@example(rows=5, width=1500, std=0.1)
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_decode(codec: str, rows: int, width: int, std: float) -> None:
    row_format = table(width, codec, std=std)
    keys = make_keys(1, torch.arange(rows, device=DEVICE) * 7)
    records = some_records(row_format, rows)
    expected = row_format.decode(keys, records)
    kept = records.clone()
    found = DecodedRows(row_format, keys, records)
    assert found.in_place and found.keys() | {"value"} == expected.keys()
    assert ("value" in found) == (codec == "fp32")  # bf16 takes no memory of its own before somebody asks
    assert torch.equal(found.read.float(), expected["value"])
    for name, plane in expected.items():
        assert torch.equal(found[name], plane), name
        is_view = found[name].untyped_storage().data_ptr() == records.untyped_storage().data_ptr()
        assert is_view == (codec == "fp32" or name != "value") or not rows
    again = row_format.decode(keys, records)  # initial values are in the records now, and nothing else is new
    assert torch.equal(again["value"], expected["value"])
    value = row_format.layout.fields[0].stop
    assert torch.equal(records[:, value:], kept[:, value:])
    assert torch.equal(row_format.decode(keys, found.encode())["value"], expected["value"])


@settings(max_examples=25)
@given(st.integers(0, 40), st.integers(1, 60), st.integers(1, 70), st.integers(0, 99))
@example(rows=40, new_rows=1, width=1, seed=0)
@example(rows=3, new_rows=2, width=1500, seed=0)
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_lay_over(codec: str, rows: int, new_rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    row_format = table(width, codec)
    keys, new_keys = (make_keys(1, torch.randperm(80)[:n].sort()[0]).to(DEVICE) for n in (rows, new_rows))
    records, new = some_records(row_format, rows), some_records(row_format, new_rows)
    row_format.layout.view(new, row_format.layout.fields[1]).fill_(4)
    found, changed = DecodedRows(row_format, keys, records.clone()), torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    found.lay_over(new_keys, new, changed)
    assert torch.equal(changed, torch.isin(keys, new_keys))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded, "use_kernels", lambda records: False)
        twin = DecodedRows(row_format, keys, records)
    marked = torch.zeros_like(changed)
    twin.lay_over(new_keys, new, marked)
    assert torch.equal(marked, changed) and not twin.in_place
    for name, plane in twin.items():
        assert torch.equal(found[name], plane), name


def test_codecs_without_a_kernel_are_copied() -> None:
    layout = RecordLayout((Plane("value", 4), COUNT, Plane("moment", 4, "bf16")))
    rows = DecodedRows(RowFormat(layout), keys_of(3), layout.empty(3, DEVICE))
    assert not rows.in_place and rows.records is None
