"""Files of engram-peft 1.2.7 by themselves, for comparisons with it.

The package imports transformers and much besides, and does not import at all on Python 3.11. A file of it that computes
needs little of that: what is missing is stood in for, and its runtime checks of shapes are left out. The wheel comes by
``pip download engram-peft==1.2.7 --no-deps`` and is unpacked by ``unzip``.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import typing
from pathlib import Path
from typing import Any

from torch import Tensor


class _Shaped:
    """In place of jaxtyping's types, which are read and not checked."""

    def __class_getitem__(cls, _: object) -> type[Tensor]:
        return Tensor


_FOR_GOOD: dict[str, dict[str, Any]] = {
    "compression": {"CompressedTokenizer": object},
    "config": {"EngramConfig": object},
    "hashing": {"HashMapping": object, "create_hash_mapping": None},
    "types": {"jaxtyped": lambda function: function},
    "utils": {"safe_from_numpy": None},
    "utils.compat": {"create_safe_training_args": None, "safe_norm": None, "safe_stack": None},
}
"""Modules of the package, by what its files take from them."""
_MEANWHILE: dict[str, dict[str, Any]] = {
    "jaxtyping": {"Float": _Shaped, "Int64": _Shaped},
    "transformers": dict.fromkeys(("DataCollatorForLanguageModeling", "PreTrainedTokenizerBase", "Trainer"), object),
}
"""Modules of others, while a file is loaded."""


def load(folder: Path, file: str) -> Any:
    """The module that ``file``, such as ``layer.py``, of the wheel unpacked in ``folder`` makes."""
    package = sys.modules.setdefault("engram_peft", types.ModuleType("engram_peft"))
    package.__path__ = []  # the compiler imports what it compiles by its name
    for name, contents in _FOR_GOOD.items():
        _stand_in(f"engram_peft.{name}", contents)
    if not hasattr(typing, "override"):
        typing.override = lambda method: method  # type: ignore[attr-defined, misc, assignment]
    name = "engram_peft." + file.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, folder / "engram_peft" / file)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    real = {other: sys.modules.pop(other, None) for other in _MEANWHILE}
    try:
        for other, contents in _MEANWHILE.items():
            _stand_in(other, contents)
        spec.loader.exec_module(module)
    finally:
        for other, there in real.items():
            del sys.modules[other]
            if there is not None:
                sys.modules[other] = there
    return module


def _stand_in(name: str, contents: dict[str, Any]) -> None:
    module = sys.modules.setdefault(name, types.ModuleType(name))
    vars(module).update(contents)
