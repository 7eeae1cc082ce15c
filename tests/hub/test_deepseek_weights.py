"""How DeepSeek-V4.1's numbers are rounded: rows and squares of weights to FP8 with scales, norm weights to bf16."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers.models.qwen4_exp", reason="needs transformers with Qwen4Exp")

from torch_engram.hub.deepseek_weights import dequantise, norm_weights, quantise
from torch_engram.stores import CODECS

E4M3 = [
    *(m * 2.0**-9 for m in range(8)),
    *((8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)),
]
"""The values of codes 0 to 126."""


def scale_byte(values: list[float]) -> int:
    """The exponent of 2**ceil(log2(largest / 448)), in exact numbers, as a byte."""
    largest = max(map(abs, values))
    if largest == 0:
        return 127
    exponent = 0
    while 448 * 2.0**exponent < largest:
        exponent += 1
    while 448 * 2.0 ** (exponent - 1) >= largest:
        exponent -= 1
    return min(254, max(1, exponent + 127))


def code(value: float) -> int:
    """The nearest E4M3, of two equally near ones the even code."""
    size = abs(value)
    above = min(bisect_left(E4M3, size), len(E4M3) - 1)
    below = max(0, above - 1)
    gaps = size - E4M3[below], E4M3[above] - size
    chosen = below if gaps[0] < gaps[1] or (gaps[0] == gaps[1] and below % 2 == 0) else above
    return chosen | (128 if math.copysign(1, value) < 0 else 0)


def fp8(values: list[float]) -> tuple[list[int], int]:
    byte = scale_byte(values)
    return [code(value / 2.0 ** (byte - 127)) for value in values], byte


@st.composite
def some_numbers(draw: Any, count: int) -> list[float]:
    """Of any size, near the borders of a scale and at ties, too."""
    exponent = draw(st.integers(-130, 100))
    kinds = st.one_of(
        st.sampled_from([0.0, -0.0, 448.0, 447.9999, 224.0, 232.0, 448.0001, 1.0625, 17.0, 2**-10, 3 * 2**-10, 464.0]),
        st.floats(-500, 500, width=32),
    )
    drawn = draw(st.lists(kinds, min_size=count, max_size=count))
    return torch.tensor([number * 2.0**exponent for number in drawn]).tolist()


@given(some_numbers(40))
def test_rows_are_rounded_as_the_format_says(values: list[float]) -> None:
    codes, scales = CODECS["fp8"].encode(torch.tensor([values]))
    wanted = fp8(values[:32]), fp8(values[32:])
    assert scales.view(torch.uint8)[0].tolist() == [byte for _, byte in wanted]
    assert codes.view(torch.uint8)[0].tolist() == wanted[0][0] + wanted[1][0]


@settings(max_examples=20)
@given(some_numbers(40), st.integers(0, 5))
def test_weights_are_rounded_in_squares(numbers: list[float], place: int) -> None:
    matrix = torch.randn(64, 96)
    values = (numbers * 26)[:1024]
    rows, columns = slice(place // 3 * 32, place // 3 * 32 + 32), slice(place % 3 * 32, place % 3 * 32 + 32)
    matrix[rows, columns] = torch.tensor(values).view(32, 32)
    codes, scales = quantise(matrix)
    assert codes.shape == (64, 96) and scales.shape == (2, 3)
    wanted, byte = fp8(values)
    assert scales.view(torch.uint8).flatten()[place] == byte
    assert codes[rows, columns].view(torch.uint8).flatten().tolist() == wanted
    factors = scales.view(torch.uint8).int().sub(127).double().exp2()
    expected = codes.double() * factors.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(dequantise(codes, scales).double(), expected)


@given(st.lists(st.tuples(*[st.floats(-100, 100, width=32)] * 2), min_size=1, max_size=20))
def test_the_product_of_the_norm_weights_is_rounded_once(pairs: list[tuple[float, float]]) -> None:
    query, key = torch.tensor(pairs).T
    found = norm_weights(query, key)
    product, wanted = found[0].double() * found[1].double(), query.double() * key.double()
    near = (product - wanted).abs() <= wanted.abs() * 2**-8 + 1e-36
    assert near.all()
    assert all(map(torch.equal, norm_weights(found[0].float(), found[1].float()), found))
