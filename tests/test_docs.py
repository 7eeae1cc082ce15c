"""The pages that are made from the code are those that the code makes, and everything public is documented."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import torch_engram

ROOT = Path(__file__).parent.parent


def test_the_api_page_is_current() -> None:
    command = [sys.executable, str(ROOT / "dev" / "build_api.py"), "--check"]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize(
    "room", ["data", "addressing", "stores", "optim", "memory", "fusion", "models", "train", "hub", "bench"]
)
def test_public_classes_and_functions_have_docstrings(room: str) -> None:
    module = importlib.import_module(f"torch_engram.{room}")
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, f"{room}.{name} has no docstring"


def test_the_package_exports_what_it_lists() -> None:
    for name in torch_engram.__all__:
        assert getattr(torch_engram, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Engramm'"):
        _ = torch_engram.Engramm


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, torch_engram; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
