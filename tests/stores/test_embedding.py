"""Records to embeddings: both forms against the codecs, to the last bit, for every code that a byte can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.stores import CODECS, Plane, RecordLayout, RowFormat, embedding_kernels
from torch_engram.stores.embedding import Columns, embed_naive
from torch_engram.stores.embedding_kernels import embed_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = {"naive": embed_naive, "kernel": embed_triton}
VALUES = [name for name in CODECS if name != "int32"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # the interpreter's: infinity is meant
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


def records_of(layout: RecordLayout, rows: int) -> Tensor:
    """Any bytes at all, but for fp32: its NaN and smallest numbers the interpreter rounds in a way of its own."""
    records = torch.randint(256, (rows, layout.nbytes), dtype=torch.uint8)
    for field in layout.fields:
        if field.component.dtype == torch.float32:
            layout.view(records, field).copy_(torch.randn(rows, field.component.width) * 3)
    return records.to(DEVICE)


def expected(layout: RecordLayout, records: Tensor, fetched: Tensor, where: Tensor, heads: list[int]) -> Tensor:
    """One row after the other, as the definition says: ``[positions, C·dim]``."""
    rows = []
    for number, first in enumerate(where.tolist()):
        for part in range(heads[number % len(heads)]):
            rows.append(records[first + part] if first >= 0 else fetched[-2 - first + part])
    read = torch.stack(rows) if rows else records[:0]
    keys = torch.zeros(len(read), dtype=torch.int64, device=DEVICE)
    values = RowFormat(layout).decode(keys, read)["value"]
    return values.view(len(where) // len(heads), sum(heads) * layout.plane("value").width)


@settings(max_examples=12)
@given(
    st.integers(1, 2), st.integers(0, 9), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 70),
    st.sampled_from(DTYPES), st.integers(0, 3), st.integers(0, 99),
)  # fmt: skip
@example(spaces=2, positions=3, heads=[2], width=2100, dtype=torch.bfloat16, gap=0, seed=0)
@pytest.mark.parametrize("codec", VALUES)
@pytest.mark.parametrize("form", FORMS)
def test_values_are_the_codecs(
    form: str, codec: str, spaces: int, positions: int, heads: list[int], width: int, dtype: torch.dtype, gap: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    layout = RecordLayout((Plane("value", width, codec), Plane("count", 1, "int32")))
    records, fetched = records_of(layout, 20), records_of(layout, 11)
    entries = spaces * positions * len(heads)
    where = torch.where(torch.rand(entries) < 0.7, torch.randint(17, (entries,)), -2 - torch.randint(8, (entries,)))
    where, columns = where.to(DEVICE), Columns.of(heads, DEVICE)
    whole = torch.full((spaces, positions, sum(heads) * width + gap), torch.nan, dtype=dtype, device=DEVICE)
    out = whole[..., : sum(heads) * width]
    assert FORMS[form](layout, records, fetched, where, columns, out) is out
    wanted = expected(layout, records, fetched, where, heads).to(dtype).view(out.shape)
    # The interpreter cuts a number off where a GPU rounds it, so there a unit in the last place is allowed.
    slack = 0.0 if form == "naive" or DEVICE.type == "cuda" or dtype == torch.float32 else 2**-7
    got = out.masked_fill(wanted.isnan(), torch.nan) if slack else out  # cut off, some NaN are infinity
    torch.testing.assert_close(got, wanted, rtol=slack, atol=slack * 1e-5, equal_nan=True)
    assert whole[..., sum(heads) * width :].isnan().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("codec, codes", [("fp8", 8), ("int8", 8), ("bf16", 16), ("fp16", 16)])
def test_every_code_of_every_scale(form: str, codec: str, codes: int) -> None:
    """All bytes of E4M3 under all of E8M0, all of int8, all words of bf16 and fp16: no bit is another."""
    layout = RecordLayout((Plane("value", 256, codec),))
    records = layout.empty(256)
    value, *scale = layout.fields
    if codes == 8:
        layout.view(records, value).view(torch.uint8).copy_(torch.arange(256))
    else:
        words = torch.arange(2**16).view(256, 256).to(torch.uint16)
        layout.view(records, value).view(torch.int16).copy_(words.view(torch.int16))
    if codec == "fp8":
        layout.view(records, scale[0]).view(torch.uint8).copy_(torch.arange(256)[:, None])
    if codec == "int8":
        layout.view(records, scale[0]).copy_(torch.randn(256, 1))
    where, out = torch.arange(256, device=DEVICE), torch.full((1, 256, 256), torch.nan, device=DEVICE)
    records = records.to(DEVICE)
    FORMS[form](layout, records, records[:0], where, Columns.of([1], DEVICE), out)
    wanted = RowFormat(layout).decode(where, records)["value"]
    number = ~wanted.isnan()
    assert torch.equal(out[0].isnan(), ~number)
    assert torch.equal(out[0].view(torch.int32)[number], wanted.view(torch.int32)[number])


def test_the_kernel_has_every_codec() -> None:
    assert set(embedding_kernels._STORED) == set(VALUES)
