"""How much memory a process may still take: what the system has to give, and what its control groups leave it.

Whoever takes more is not refused: the system goes on to the end, and then ends processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LIMIT, _USED, _CACHED = (
    ("memory.max", "memory.limit_in_bytes"),
    ("memory.current", "memory.usage_in_bytes"),
    ("inactive_file", "total_inactive_file"),
)
"""What each is called in control groups of version 2 and 1."""


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may take, with what it would get back of files that are cached; None where the system
    does not say. ``root``: where ``proc`` and ``sys`` are."""
    found = list(_left_by_groups(root))
    with suppress(OSError, KeyError):
        found.append(int(_fields(root / "proc/meminfo")["MemAvailable:"]) * 1024)
    return min(found, default=None)


def _left_by_groups(root: Path) -> Iterator[int]:
    """What the control groups of this process, and those above them, of either version, have left."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            with suppress(OSError, ValueError):  # no such group in this view, or "max"
                version = 1 if controllers else 0
                limit = int((mount / group / _LIMIT[version]).read_text())
                yield max(0, limit - _used(mount / group, version))


def _used(group: Path, version: int) -> int:
    """Bytes that a control group would not get back of files."""
    used = cached = 0
    with suppress(OSError):
        used = int((group / _USED[version]).read_text())
        cached = int(_fields(group / "memory.stat").get(_CACHED[version], 0))
    return max(0, used - cached)


def _fields(path: Path) -> dict[str, str]:
    return {line.split()[0]: line.split()[1] for line in path.read_text().splitlines()}
