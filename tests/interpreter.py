"""Triton's interpreter, which runs the kernels where there is no GPU, without what it does over and over."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _builtins_of(package: Any) -> list[str]:
    """Names of all that the interpreter puts something of its own in place of."""
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name in _builtins_of(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # not yet replaced
            interpreter._patch_attr(package, name, member, builder, scope)


def make_quick() -> None:
    """Each launch, and each call of one kernel by another, looks through the whole language: once will do."""
    interpreter._patch_builtin = _patch_builtin
