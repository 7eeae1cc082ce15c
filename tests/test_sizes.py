"""Sizes in bytes, as options and arguments take them."""

from __future__ import annotations

from typing import Any

import pytest

from torch_engram.sizes import parse_size


@pytest.mark.parametrize(
    "size, expected",
    [
        ("8GB", 8 * 10**9), ("512MiB", 2**29), ("1.5 kb", 1500), (" 7 ", 7), ("2B", 2), ("7kib", 7168), ("0", 0),
        ("1.5 TiB", 3 * 2**39), (2**34, 2**34), (0, 0), ("0.1GB", 10**8), ("9007199254740993", 2**53 + 1),
    ],
)  # fmt: skip
def test_sizes_are_read(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    "size", ["", "GB", "8 GBs", "-3MB", "eight", -1, "0.1B", True, 2.5, "1e9", None, "8GB of", "٣GB", "1.GB", "3 MiBB"]
)
def test_what_is_no_size_is_refused_with_the_mend(size: Any) -> None:
    with pytest.raises(ValueError, match="is no size: write bytes as a whole number, or with a unit as in '8GB'"):
        parse_size(size)
