"""``engram table convert`` as a user meets it: real processes that are killed, limited, raced and robbed of their files."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torch_engram.stores.synthetic import synthesise

CONVERT = """
import os, resource, sys, time, torch
from torch_engram.cli import main
from torch_engram.stores import convert, steady_files
torch.set_num_threads(1)
signal_file, pause, limit = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
convert.CHUNK_NUMBERS, convert.STRIDE = 1 << 15, 1 << 17
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
read = steady_files.SteadyFile.read
def slowly(self, into, start):
    open(signal_file, "w").close()
    time.sleep(pause)
    read(self, into, start)
steady_files.SteadyFile.read = slowly
sys.argv[1:] = ["table", "convert", *sys.argv[4:]]
main()
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A conversion as a process of its own, in small steps with pauses; it has begun to read."""
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: object, pause: float = 0.02, limit: int = 0) -> subprocess.Popen[str]:
        begun = tmp_path / f"begun-{len(running)}"
        command = [sys.executable, "-c", CONVERT, str(begun), str(pause), str(limit), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        running.append(process)
        while process.poll() is None and not begun.exists():
            time.sleep(0.01)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


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


@pytest.mark.parametrize("size", ["4", "4096", "0.5GiB", "3 TB"])
def test_sizes_have_units(engram, tmp_path, source, size):
    done = engram("table", "convert", source, tmp_path / "out", "--shard-size", size)
    assert (done.code == 0) == ("B" in size), done
    done = engram("table", "convert", source, tmp_path / "x", "--shard-size", f"{size} bananas")
    assert done.code == 1 and "bananas' is no size: give a number and kB, MB" in done.err


def test_killed_at_random_moments_and_begun_again_it_writes_the_same_files(start, engram, tmp_path, source):
    arguments = ("--codec", "fp32", "--shards", "3")
    assert engram("table", "convert", source, tmp_path / "at once", *arguments).code == 0
    moments = random.Random(4)
    for _ in range(3):
        process = start(source, tmp_path / "out", *arguments)
        time.sleep(moments.uniform(0.1, 0.7))  # of about 2 seconds
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    done = engram("table", "convert", source, tmp_path / "out", "--codec", "bf16", "--shards", "3")
    assert done.code == 1 and "out.converting is left from another conversion (--codec was fp32, not bf16)" in done.err
    process = start(source, tmp_path / "out", *arguments, pause=0)
    out, err = process.communicate()
    assert process.returncode == 0 and "of them in an earlier run" in out, err
    assert files(tmp_path / "out") == files(tmp_path / "at once")
    assert not list(tmp_path.glob("*.converting"))


def test_a_full_disk_is_said_and_with_more_room_it_goes_on(start, engram, tmp_path, source):
    process = start(source, tmp_path / "out", pause=0, limit=3_000_000)
    _, err = process.communicate()
    assert process.returncode == 1 and not (tmp_path / "out").exists()
    assert "out.converting/table/model.safetensors: File too large; make room" in err
    done = engram("table", "convert", source, tmp_path / "out")
    assert done.code == 0 and "of them in an earlier run" in done.out
    assert engram("table", "verify", tmp_path / "out").code == 0


def test_two_processes_do_not_write_one_table(start, engram, tmp_path, source):
    process = start(source, tmp_path / "out")
    done = engram("table", "convert", source, tmp_path / "out")
    assert done.code == 1 and f"Another process converts into {tmp_path / 'out'}" in done.err
    _, err = process.communicate()
    assert process.returncode == 0, err
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
    _, err = process.communicate()
    name = first.name if change == "replaced" else last.name
    assert process.returncode == 1 and f"{name} was changed or replaced while it was read" in err, err
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


MEASURED = """
import sys, torch
from pathlib import Path
from torch_engram.stores.convert import Conversion
from torch_engram.stores.row_sources import named_rows
from torch_engram.stores.shards import Target
torch.set_num_threads(1)
def convert(name):
    source = Path(sys.argv[1]) / name
    Conversion(source, named_rows(source), source.with_name(f"{name}-out"), Target("plain", sys.argv[2])).run()
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
convert("small")
before = peak()
convert("large")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its peak memory")
@pytest.mark.parametrize("codec", ["bf16", "fp8"])
def test_memory_does_not_grow_with_the_table(tmp_path: Path, codec: str) -> None:
    for name, rows in (("small", 1 << 15), ("large", 1 << 20)):  # 8 and 268 MB: one chunk, and 128 of them
        synthesise(tmp_path / name, "plain", rows, 128, "bf16")
    done = subprocess.run([sys.executable, "-c", MEASURED, tmp_path, codec], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 2**20
