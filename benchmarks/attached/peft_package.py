"""engram-peft 1.2.7 as a whole, from its unpacked wheel, for comparisons with it.

The wheel comes by ``pip download engram-peft==1.2.7 --no-deps`` and is unpacked by ``unzip``. Its import fails on
Python 3.11, whose ``typing`` has no ``override``, and wherever one of its many requirements is missing. What is missing
is stood in for, in this process alone: ``typing.override``, the shapes of ``jaxtyping``, which it reads and checks only
when it is told to, and the base classes that it takes from ``trl``, none of which a measurement uses. Nothing else of
it is changed.
"""

from __future__ import annotations

import sys
import types
import typing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

VERSION = "1.2.7"


class _Shaped:
    """In place of jaxtyping's types."""

    def __class_getitem__(cls, _: object) -> type[Tensor]:
        return Tensor


_MISSING: dict[str, dict[str, Any]] = {
    "jaxtyping": {"Float": _Shaped, "Int": _Shaped, "Int64": _Shaped},
    "trl": {"SFTConfig": object, "SFTTrainer": object},
}
"""What its files take from packages that may not be there."""


def load(folder: Path) -> Any:
    """The package ``engram_peft`` in ``folder``. An ``assert`` fails for another version."""
    found = [path.name for path in folder.glob("engram_peft-*.dist-info")]
    assert found == [f"engram_peft-{VERSION}.dist-info"], f"{folder} holds {found}: unpack engram-peft {VERSION} there"
    if not hasattr(typing, "override"):
        typing.override = lambda method: method  # type: ignore[attr-defined, misc, assignment]
    for name, contents in _MISSING.items():
        if find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(contents)
    sys.path.insert(0, str(folder))
    try:
        import engram_peft
        import engram_peft.model
    finally:
        sys.path.remove(str(folder))
    return engram_peft
