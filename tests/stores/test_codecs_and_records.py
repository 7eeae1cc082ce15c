"""Codecs round as they say, records pack any planes, and initial rows belong to their place alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.stores import CODECS, Plane, RecordLayout, RowFormat, make_keys
from torch_engram.stores.counter import counter_bits, initial_rows

BF16 = CODECS["bf16"]
ERRORS = {"fp32": 0.0, "bf16": 2**-7, "fp16": 2**-11, "fp8": 2**-4, "int8": 1 / 254}
"""Largest error of a codec over the largest number of its row."""
PLANES = st.lists(st.tuples(st.integers(1, 70), st.sampled_from(list(ERRORS))), min_size=1, max_size=4)


def test_stochastic_rounding_is_unbiased_and_stays_between_the_neighbours() -> None:
    values = torch.tensor([1.0 + 2**-10, -3.0 - 2**-9, 1e-3, 1.0, -0.0, 3e38])
    keys = make_keys(0, torch.arange(40_000))
    (rounded,) = BF16.encode(values.expand(40_000, -1), counter_bits(3, keys, 5, 6))
    below = (values.view(torch.int32) & -0x10000).view(torch.float32)
    above = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert bool(((rounded.float() == below) | (rounded.float() == above)).all())
    gap = (above - below).abs()
    share = ((rounded.float() - below).abs() / gap).mean(dim=0)  # how often it went away from zero
    wanted = (values - below).abs() / gap
    assert torch.allclose(share, wanted, atol=4 * 0.5 / math.sqrt(40_000))
    assert bool((rounded[:, 3] == 1).all())  # what bf16 holds exactly stays


def test_stochastic_rounding_is_a_function_of_the_place_and_the_count() -> None:
    layout = RecordLayout((Plane("value", 16, "bf16"), Plane("count", 1, "int32")))
    row_format, keys = RowFormat(layout, seed=1), make_keys(2, torch.arange(9))
    planes = {"value": torch.randn(9, 16), "count": torch.full((9, 1), 4, dtype=torch.int32)}
    records = row_format.encode(keys, planes)
    part = torch.tensor([7, 0, 3])
    assert torch.equal(row_format.encode(keys[part], {k: v[part] for k, v in planes.items()}), records[part])
    for other in (
        RowFormat(layout, seed=2).encode(keys, planes),
        row_format.encode(keys + 1, planes),
        row_format.encode(make_keys(3, torch.arange(9)), planes),
        row_format.encode(keys, {**planes, "count": planes["count"] + 1}),
    ):
        assert not torch.equal(other[:, :32], records[:, :32])


def test_nan_and_infinity_pass() -> None:
    values = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]])
    for noise in (None, torch.full((1, 4), 0xFFFF)):
        (found,) = BF16.encode(values, noise)
        assert found.isnan().tolist() == [[True, False, False, False]]
        assert found[0, 1:].tolist() == [math.inf, -math.inf, 0.0]


@pytest.mark.parametrize("codec", ["fp16", "fp8", "int8"])
def test_what_a_codec_holds_exactly_comes_back_and_zero_is_zero(codec: str) -> None:
    values = torch.cat((torch.randn(50, 70) * 10.0 ** torch.randint(-3, 4, (50, 1)), torch.zeros(1, 70)))
    found = CODECS[codec].decode(CODECS[codec].encode(values))
    again = CODECS[codec].encode(found)
    assert torch.equal(CODECS[codec].decode(again), found)
    assert not found[-1].any()


def test_fp8_is_deepseeks() -> None:
    """Scales 2**ceil(log2(largest / 448)) as bytes, zeros under 2**0; read by shifting the byte into an exponent."""
    rows = torch.stack([torch.full((64,), 448.0), torch.full((64,), 449.0), torch.zeros(64), torch.full((64,), 1.0)])
    rows[3, 32:] = 2**-20
    codes, scales = CODECS["fp8"].encode(rows)
    assert scales.view(torch.uint8).tolist() == [[127, 127], [128, 128], [127, 127], [119, 99]]
    assert codes.float()[:, ::32].tolist() == [[448, 448], [224, 224], [0, 0], [256, 256]]
    every = torch.arange(256, dtype=torch.uint8)
    ones = torch.ones(256, 1).to(torch.float8_e4m3fn)
    read = CODECS["fp8"].decode((ones, every[:, None].view(torch.float8_e8m0fnu))).flatten()
    assert read.tolist() == [0.0, *(2.0 ** (byte - 127) for byte in range(1, 255)), math.inf]
    lowest, highest = torch.full((1, 32), 2.0**-140), torch.full((1, 32), 3.4e38)
    assert CODECS["fp8"].encode(lowest)[1].view(torch.uint8).item() == 1
    assert CODECS["fp8"].encode(highest)[1].view(torch.uint8).item() == 247


@pytest.mark.parametrize("width", [1, 31, 32, 33, 256])
def test_every_code_of_fp8_with_every_scale_is_decoded_exactly(width: int) -> None:
    """By PyTorch's own E4M3 and the definition of a scale; more rows than are decoded together, too."""
    codes = (torch.arange(256 * 256 * width) // 256 % 256).to(torch.uint8).view(-1, width).view(torch.float8_e4m3fn)
    codes = codes[:: max(1, width // 8)]
    scale = torch.arange(len(codes) * -(-width // 32)).to(torch.uint8).view(len(codes), -1)
    factors = (scale.to(torch.int32) << 23).view(torch.float32).repeat_interleave(32, 1)[:, :width]
    decoded = CODECS["fp8"].decode((codes, scale.view(torch.float8_e8m0fnu)))
    expected = codes.float() * factors
    assert torch.equal(decoded.isnan(), expected.isnan())
    assert torch.equal(decoded.nan_to_num(7.0).view(torch.int32), expected.nan_to_num(7.0).view(torch.int32))


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_what_a_scaled_codec_has_not_makes_nan_of_all_that_shares_its_scale(number: float) -> None:
    rows = torch.ones(2, 40)
    rows[0, 3] = number
    for codec, spoilt in (("fp8", 32), ("int8", 40)):
        found = CODECS[codec].decode(CODECS[codec].encode(rows))
        assert found[0, :spoilt].isnan().all() and (found[0, spoilt:] == 1).all() and (found[1] == 1).all()


@given(PLANES, st.integers(0, 5))
def test_any_planes_fit_a_record_and_come_back(planes: list[tuple[int, str]], rows: int) -> None:
    layout = RecordLayout(tuple(Plane(f"p{i}", width, codec) for i, (width, codec) in enumerate(planes)))
    assert layout.nbytes % 8 == 0
    ends = 0
    for field in layout.fields:  # no two overlap, each lies on its own element's boundary
        assert field.start >= ends and field.start % field.component.dtype.itemsize == 0
        ends = field.stop
    assert ends <= layout.nbytes
    row_format, keys = RowFormat(layout), torch.arange(rows)
    values = {plane.name: torch.randn(rows, plane.width) for plane in layout.planes}
    records = row_format.encode(keys, values)
    decoded = row_format.decode(keys, records)
    for plane in layout.planes:
        close = ERRORS[plane.codec] * (1 + 1e-6)
        largest = values[plane.name].abs().amax(dim=1, keepdim=True) if rows else 0
        assert bool(((decoded[plane.name] - values[plane.name]).abs() <= close * largest).all())
        assert decoded[plane.name].dtype == torch.float32 and decoded[plane.name].is_contiguous()
    exact = all(codec == "fp32" for _, codec in planes)
    assert not exact or torch.equal(row_format.encode(keys, decoded), records)


@given(st.integers(0, 2**63), st.integers(0, 7), st.integers(1, 40), st.data())
def test_initial_rows_belong_to_their_place(seed: int, space: int, width: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=9, unique=True))
    keys = make_keys(space, torch.tensor(rows))
    drawn = initial_rows(seed, keys, width, 0.5)
    order = torch.randperm(len(rows))
    assert torch.equal(initial_rows(seed, keys[order], width, 0.5), drawn[order])
    assert torch.equal(initial_rows(seed, keys[:1], width, 0.5), drawn[:1])
    assert torch.equal(initial_rows(seed, keys, width + 3, 0.5)[:, :width], drawn)
    assert torch.equal(initial_rows(seed, keys, width, 1.0), 2 * drawn)


def test_initial_rows_look_normal_and_do_not_repeat() -> None:
    drawn = initial_rows(7, make_keys(1, torch.arange(20_000)), 16, 0.02)
    assert abs(drawn.mean()) < 4 * 0.02 / math.sqrt(drawn.numel())
    assert abs(drawn.std() / 0.02 - 1) < 0.01
    assert abs(torch.corrcoef(drawn.T) - torch.eye(16)).max() < 0.04
    assert abs(torch.corrcoef(drawn[:20])[0, 1:]).max() < 0.9
    others = [
        initial_rows(8, make_keys(1, torch.arange(99)), 16, 1.0),
        initial_rows(7, make_keys(2, torch.arange(99)), 16, 1.0),
    ]
    assert all(not (other == drawn[:99] / 0.02).any(dim=1).all() for other in others)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_a_row_is_its_initial_value_until_its_first_update(codec: str) -> None:
    layout = RecordLayout((Plane("value", 4, codec), Plane("count", 1, "int32")))
    row_format, keys = RowFormat(layout, seed=3, init_std=0.5), make_keys(0, torch.arange(6))
    fresh = row_format.decode(keys, layout.empty(6))
    assert fresh["value"].abs().min() > 0
    assert torch.equal(fresh["value"].bfloat16().float(), fresh["value"]) == (codec == "bf16")
    fresh["count"][1] = 1
    fresh["value"][1] = 0
    again = row_format.decode(keys, row_format.encode(keys, fresh))
    assert torch.equal(again["value"], fresh["value"])  # an all-zero row that was updated stays zero


def test_devices_draw_the_same_bits(device: torch.device) -> None:
    keys = make_keys(3, torch.arange(999))
    assert torch.equal(counter_bits(5, keys.to(device), 2, 33).cpu(), counter_bits(5, keys, 2, 33))
    assert torch.equal(initial_rows(5, keys.to(device), 33, 0.02).cpu(), initial_rows(5, keys, 33, 0.02))
