"""``engram table convert`` as a user meets it: processes that are killed, limited, raced and robbed of their files."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from torch_engram.cli import main
from torch_engram.memory import save_bank
from torch_engram.stores import convert
from torch_engram.stores.open_files import OpenFile
from torch_engram.stores.synthetic import synthesise


class Process:
    """``engram`` with these arguments in a fork of this process, in small steps with pauses."""

    def __init__(self, folder: Path, *arguments: object, pause: float = 0.02, limit: int = 0):
        self.begun, self.written = folder / "begun", folder / "written"
        self.begun.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._engram(arguments, pause, limit)
            finally:
                os._exit(70)
        while not self.begun.exists() and self._ended(os.WNOHANG) is None:
            time.sleep(0.005)

    def _engram(self, arguments: tuple[object, ...], pause: float, limit: int) -> None:
        read = OpenFile.read_into

        def slowly(file: OpenFile, at: int, target: NDArray[np.uint8]) -> None:
            self.begun.touch()
            time.sleep(pause)
            read(file, at, target)

        with open(self.written, "w") as sys.stdout:
            sys.stderr = sys.stdout
            OpenFile.read_into = slowly
            convert.CHUNK_NUMBERS, convert.STRIDE = 1 << 15, 1 << 17
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            sys.argv = ["engram", "table", "convert", *map(str, arguments)]
            try:
                main()
                code: object = 0
            except SystemExit as end:
                code = end.code
            if isinstance(code, str):
                print(code)
            sys.stdout.flush()
            os._exit(1 if isinstance(code, str) else int(str(code or 0)))

    code: int | None = None

    def _ended(self, options: int) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, options)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def end(self) -> tuple[int | None, str]:
        """Its exit code, and what it wrote."""
        return self._ended(0), " ".join(self.written.read_text().split())

    def kill(self) -> int | None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
        return self._ended(0)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """A process that has begun to read."""
    running: list[Process] = []

    def run(*arguments: object, **options: float) -> Process:
        running.append(Process(tmp_path, *arguments, **options))
        return running[-1]

    yield run
    for process in running:
        process.kill()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """4 MB in 4 files, of which a conversion reads 64 pieces."""
    synthesise(tmp_path / "source", "qwen4exp", 16_384, 128, "bf16", shards=4)
    return tmp_path / "source"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_it_writes_what_info_shows_and_verify_passes(engram, tmp_path, source):
    out = tmp_path / "out"
    done = engram("table", "convert", source, out, "--layout", "plain", "--codec", "fp8")
    assert done.code == 0 and f"Wrote {out}: 2.2 MB in 1 file." in done.out, done
    assert "layers.1.table.weight plain 1 16,384 128 fp8 2.2 MB 1" in engram("table", "info", out).out
    back = tmp_path / "back"
    done = engram("table", "convert", out, back, "--layout", "qwen4exp", "--shard-size", "1.2 MiB")
    assert done.code == 0 and "4.2 MB in 4 files" in done.out, done
    assert "Qwen4Exp 1 16,384 128 bf16 4.2 MB 4" in engram("table", "info", back).out
    for folder, count in ((out, 1), (back, 4)):
        done = engram("table", "verify", folder)
        assert done.code == 0 and done.out.count("whole ") == count
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)


def test_a_saved_memory_becomes_shards(engram, make_bank, tmp_path):
    save_bank(make_bank(), tmp_path / "memory")
    done = engram(
        "table", "convert", tmp_path / "memory", tmp_path / "out", "--layout", "deepseek-v4.1", "--shards", "2"
    )
    assert done.code == 0 and "in 2 files" in done.out, done
    for layer in (1, 3):
        assert (
            f"layers.{layer}.engram.embed.weight DeepSeek-V4.1 {layer} "
            in engram("table", "info", tmp_path / "out").out
        )
    assert engram("table", "verify", tmp_path / "out").out.count("whole ") == 2


@pytest.mark.parametrize("size", ["4", "4096", "0.5GiB", "3 TB"])
def test_sizes_have_units(engram, tmp_path, source, size):
    done = engram("table", "convert", source, tmp_path / "out", "--shard-size", size)
    assert (done.code == 0) == ("B" in size), done
    done = engram("table", "convert", source, tmp_path / "x", "--shard-size", f"{size} bananas")
    assert done.code == 1 and "bananas' is no size: write bytes as a whole number" in done.err


def test_killed_at_random_moments_and_begun_again_it_writes_the_same_files(start, engram, tmp_path, source):
    arguments = ("--codec", "fp32", "--shards", "3")
    assert engram("table", "convert", source, tmp_path / "at once", *arguments).code == 0
    moments = random.Random(4)
    for _ in range(3):
        process = start(source, tmp_path / "out", *arguments)
        time.sleep(moments.uniform(0.05, 0.4))  # of 1.3 seconds that it waits for its 64 reads
        assert process.kill() == -signal.SIGKILL and not (tmp_path / "out").exists()
    done = engram("table", "convert", source, tmp_path / "out", "--codec", "bf16", "--shards", "3")
    assert done.code == 1 and "out.converting is left from another conversion (--codec was fp32, not bf16)" in done.err
    code, written = start(source, tmp_path / "out", *arguments, pause=0).end()
    assert code == 0 and "of them in an earlier run" in written
    assert files(tmp_path / "out") == files(tmp_path / "at once")
    assert not list(tmp_path.glob("*.converting"))


def test_a_full_disk_is_said_and_with_more_room_it_goes_on(start, engram, tmp_path, source):
    code, written = start(source, tmp_path / "out", pause=0, limit=3_000_000).end()
    assert code == 1 and "out.converting/table/model.safetensors: File too large; make room" in written
    assert not (tmp_path / "out").exists()
    done = engram("table", "convert", source, tmp_path / "out")
    assert done.code == 0 and "of them in an earlier run" in done.out
    assert engram("table", "verify", tmp_path / "out").code == 0


def test_two_processes_do_not_write_one_table(start, engram, tmp_path, source):
    process = start(source, tmp_path / "out")
    done = engram("table", "convert", source, tmp_path / "out")
    assert done.code == 1 and f"Another process converts into {tmp_path / 'out'}" in done.err
    assert process.end()[0] == 0
    assert engram("table", "verify", tmp_path / "out").code == 0
    done = engram("table", "convert", source, tmp_path / "out")
    assert done.code == 1 and "is there already" in done.err


@pytest.mark.parametrize("change", ["cut off", "replaced", "gone", "written to"])
def test_a_source_that_changes_meanwhile_leaves_no_table(start, engram, tmp_path, source, change):
    process = start(source, tmp_path / "out")
    first, last = (source / f"table-0000{number}.safetensors" for number in (0, 3))
    match change:
        case "cut off":
            os.truncate(last, 500_000)
        case "replaced":  # after it was read, perhaps, by the very same bytes
            (tmp_path / "other").write_bytes(first.read_bytes())
            (tmp_path / "other").rename(first)
        case "gone":
            last.unlink()
        case "written to":
            with open(last, "r+b") as file:
                file.write(file.read(1))
    code, written = process.end()
    name = first.name if change == "replaced" else last.name
    what = "changed" if change in ("cut off", "written to") else "replaced or removed"
    assert code == 1 and f"{name} was {what} while it was in use" in written
    assert written.endswith("anew." if what == "changed" else "when nobody writes it."), written
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.converting").exists()


def test_where_nothing_can_be_written_is_said(engram, tmp_path, source):
    done = engram("table", "convert", source, source / "table-00000.safetensors" / "out")
    assert done.code == 1 and "table-00000.safetensors" in done.err and "Traceback" not in done.err
    done = engram("table", "convert", source / "table-00000.safetensors", source / "out")
    assert done.code == 0, done  # beside a file that is read, there is room
    if os.geteuid():
        tmp_path.chmod(0o500)
        done = engram("table", "convert", source, tmp_path / "out")
        assert done.code == 1 and "Permission denied; check that path" in done.err


FEW_FILES = """
import resource, sys
from torch_engram.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sys.argv[0] = "engram"
main()
"""


def test_more_files_than_may_be_open_are_a_sentence(tmp_path: Path) -> None:
    synthesise(tmp_path / "many", "qwen4exp", 80, 8, "bf16", shards=80)
    arguments = [sys.executable, "-c", FEW_FILES, "table", "convert", tmp_path / "many", tmp_path / "out"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert "safetensors: Too many open files; let the command hold more files open (ulimit -n)." in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["many"]


MEASURED = """
import sys, torch
from pathlib import Path
from torch_engram.stores.convert import Conversion
from torch_engram.stores.row_sources import named_rows
from torch_engram.stores.shards import Target
torch.set_num_threads(1)
def convert(name, codec):
    source = Path(sys.argv[1]) / name
    Conversion(source, named_rows(source), Path(sys.argv[1]) / f"{name}-{codec}", Target("plain", codec)).run()
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
convert("small", "fp8")
before = peak()
convert("large", "fp8")
convert("large", "bf16")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its peak memory")
def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    for name, rows in (("small", 1 << 14), ("large", 1 << 19)):  # two chunks, and 64 of them in 134 MB
        synthesise(tmp_path / name, "plain", rows, 128, "bf16")
    done = subprocess.run([sys.executable, "-c", MEASURED, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 2**20
