"""The plan of the house: a room imports only rooms above it, and the two wings do not know each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "torch_engram"
ROOMS = (
    "config",
    "window",
    "durable",
    "forks",
    "sizes",
    "free_memory",
    "kernels",
    "data",
    "addressing",
    "stores",
    "optim",
    "memory",
    "fusion",
    "models",
    "generate",
    "train",
    "hub",
    "analysis",
    "studies",
    "bench",
    "cli",
)
MEMORY_WING = {"addressing", "stores", "optim", "memory"}
NETWORK_WING = {"fusion", "models"}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem in ROOMS)


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written out in full"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "torch_engram" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_up_and_never_across(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS, f"{room} has no place in the plan of the house"
    for other in imported_rooms(path):
        assert ROOMS.index(other) <= ROOMS.index(room), f"{room} imports {other}, a later room"
        assert not (room in MEMORY_WING and other in NETWORK_WING), f"the memory wing ({room}) imports {other}"
        assert not (room in NETWORK_WING and other in MEMORY_WING), f"the network wing ({room}) imports {other}"


def test_source_files_stay_small() -> None:
    lengths = sorted(len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py"))
    assert lengths[len(lengths) // 2] <= 200
    assert lengths[-1] <= 400


def test_nothing_unpickles() -> None:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert "torch.load(" not in text and "import pickle" not in text, path
