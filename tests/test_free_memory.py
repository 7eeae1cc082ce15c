"""What a process may still take: of the system, and of every control group that it is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torch_engram.free_memory import free_memory

AVAILABLE = 8000 * 1024


def system(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(content)
    return root


@pytest.mark.parametrize("cgroup, files, free", [
    ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "4096\n"}, 4096),
    ("0::/\n", {"memory.max": "max\n"}, AVAILABLE),
    ("0::/\n", {"memory.max": "9000\n", "memory.current": "8000\n"}, 1000),
    ("0::/\n", {"memory.max": "9000\n", "memory.current": "9500\n"}, 0),
    ("0::/", {"memory.max": "9000", "memory.current": "8000", "memory.stat": "anon 5\ninactive_file 500\n"}, 1500),
    ("4:cpu:/x\n3:memory,hugetlb:/y\n", {"memory/y/memory.limit_in_bytes": "1024\n", "x/memory.max": "1\n"}, 1024),
    ("3:memory:/elsewhere\n", {"memory/memory.limit_in_bytes": "2048\n"}, 2048),
    ("3:memory:/", {f"memory/memory.{name}": content for name, content in (
        ("limit_in_bytes", "9000"), ("usage_in_bytes", "8000"), ("stat", "inactive_file 1\ntotal_inactive_file 250\n")
    )}, 1250),
    ("", {}, AVAILABLE),
])  # fmt: skip
def test_the_least_of_all_limits(tmp_path: Path, cgroup: str, files: dict[str, str], free: int) -> None:
    assert free_memory(system(tmp_path, cgroup, files)) == free


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None


def test_this_system_says() -> None:
    assert 0 < (free_memory() or 0) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
