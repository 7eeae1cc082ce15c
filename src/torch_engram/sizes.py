"""Sizes in bytes as people write them: ``"8GB"``, ``"1.5TiB"``, ``2**30``."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]*)\s*", re.ASCII)


def parse_size(size: int | str) -> int:
    """Bytes of a size: a whole number of them, or a number with a unit from B, KB, KiB, .. to TB, TiB, in any case.

    Raises ``ValueError`` for anything else.
    """
    found = _WRITTEN.fullmatch(str(size).upper())
    unit = _UNITS.get(found[2], 0) if found else 0
    count = Decimal(found[1]) * unit if found else Decimal()
    if not unit or (unit == 1 and count != int(count)):
        raise ValueError(f"{size!r} is no size: write bytes as a whole number, or with a unit as in '8GB' or '1.5TiB'.")
    return int(count)
