"""Tables that are trained on disk: the same bytes as a dictionary under a cache of any size and several threads, in
every way that blocks are moved; and disks that fill up or fail, other processes, and what a killed one left."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from disk_ways import unavailable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from torch_engram.stores import DiskTable, Plane, RecordLayout, make_keys, working_file
from torch_engram.stores.block_reads import BLOCK

SPACES = {0: 1500, 3: 700}
ROWS = sum(SPACES.values())
WIDTHS = {1: "many rows a block", 35: "some go on in the next", 500: "most do", 2100: "all lie in three or four"}
"""Numbers of a row."""
Make = Callable[..., DiskTable]


def layout_of(width: int) -> RecordLayout:
    return RecordLayout((Plane("value", width), Plane("count", 1, "int32")))


def keys_of(rows: Tensor) -> Tensor:
    """Keys of the rows of both spaces, numbered on."""
    return torch.where(rows < SPACES[0], rows, make_keys(3, rows - SPACES[0]))


ALL = keys_of(torch.arange(ROWS))


@pytest.fixture(params=["direct", "threads, direct", "cached", "threads, cached"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How blocks are moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "cached" in request.param:
            monkeypatch.setattr(working_file, "open_direct", unavailable)
        if "threads" in request.param:
            monkeypatch.setattr(working_file, "AioTransfer", unavailable)
        yield request.param


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(width: int = 35, spaces: Mapping[int, int] = SPACES, folder: str = "rows", **options: int) -> DiskTable:
        return DiskTable(layout_of(width), spaces, tmp_path / folder, **{"staging": 0, **options})

    return build


def random_records(store: DiskTable, rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (rows, store.layout.nbytes), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("width", WIDTHS, ids=WIDTHS.values())
def test_holds_what_was_written_in_every_way(way: str, make: Make, tmp_path: Path, width: int) -> None:
    """Against an array, and at last in the file, which other readers can read."""
    store, generator = make(width), torch.Generator().manual_seed(width)
    expected = store.layout.empty(ROWS)
    for number in range(12):
        rows = torch.randperm(ROWS, generator=generator)[: 20 + 40 * (number % 4)]
        rows = rows.sort().values if number % 2 else rows
        records = random_records(store, len(rows), generator)
        store.write(keys_of(rows), records)
        expected[rows] = records
        if number % 3 == 0:
            store.flush()
            asked = torch.randint(0, ROWS, (60,), generator=generator)
            assert torch.equal(store.fetch(keys_of(asked)), expected[asked])
    store.flush()
    assert torch.equal(store.fetch(ALL), expected)
    with safe_open(tmp_path / "rows" / "rows-00.safetensors", framework="pt") as file:
        assert torch.equal(torch.cat([file.get_tensor(f"rows.{space}") for space in SPACES]), expected)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "fetch", "flush"]), st.integers(0, ROWS - 1), st.integers(1, 90), st.booleans()
    ),
    max_size=15,
)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, st.sampled_from([35, 500]))
def test_is_a_dictionary(make: Make, steps: list[tuple[str, int, int, bool]], width: int) -> None:
    """Neighbours that share blocks, or rows all over the table; a fetch lays what is not acknowledged over."""
    gc.collect()
    store, generator = make(width), torch.Generator().manual_seed(len(steps))
    expected = store.layout.empty(ROWS)
    late: list[tuple[int, Tensor]] = []
    for what, first, count, apart in steps:
        rows = ((first + torch.arange(count) * (23 if apart else 1)) % ROWS).unique()
        match what:
            case "write":
                expected[rows] = random_records(store, len(rows), generator)
                late.append((store.write(keys_of(rows), expected[rows]), rows))
            case "fetch":
                seen = store.acknowledged
                found = store.fetch(keys_of(rows))
                newer = [written for epoch, written in late if epoch > seen]
                exact = ~torch.isin(rows, torch.cat(newer)) if newer else torch.ones(len(rows), dtype=torch.bool)
                assert torch.equal(found[exact], expected[rows][exact])
            case _:
                store.flush()
                assert store.acknowledged == len(late)
    store.flush()
    assert torch.equal(store.fetch(ALL), expected)


def test_several_threads_fetch_while_one_writes(make: Make) -> None:
    """Every row says how often it was written, in all of its bytes: none comes back older than the epoch that was
    acknowledged before, or torn where no write was under way."""
    store, generator, newest = make(35), torch.Generator().manual_seed(1), [0]
    errors: list[BaseException] = []
    written_at = np.zeros((64, ROWS), np.int64)  # by epoch: which one wrote a row last

    def reader(seed: int) -> None:
        own = torch.Generator().manual_seed(seed)
        try:
            while newest[0] < 30:
                rows = torch.randperm(ROWS, generator=own)[:200].sort().values
                seen = store.acknowledged
                found = store.fetch(keys_of(rows)).numpy()
                asked_late = newest[0]
                oldest = written_at[seen][rows.numpy()]
                whole = (found == found[:, :1]).all(1)
                late = (written_at[min(asked_late + 1, 63)][rows.numpy()] != oldest) | (asked_late > seen)
                assert (found[:, 0][whole] >= oldest[whole]).all()
                assert (whole | late).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in (5, 6, 7)]
    for thread in threads:
        thread.start()
    for epoch in range(1, 31):
        rows = torch.randperm(ROWS, generator=generator)[:300]
        written_at[epoch:, rows.numpy()] = epoch
        records = torch.full((300, store.layout.nbytes), epoch, dtype=torch.uint8)
        assert store.write(keys_of(rows), records) == epoch
        newest[0] = epoch
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    store.flush()
    assert np.array_equal(store.fetch(ALL).numpy()[:, 5], written_at[30])


def test_rows_that_were_never_written_are_not_read_and_take_no_room(make: Make, tmp_path: Path) -> None:
    store = make(35, {0: 20_000_000}, staging=1 << 20)
    path = tmp_path / "rows" / "rows-00.safetensors"
    assert path.stat().st_size > 2 << 30 and path.stat().st_blocks * 512 < 1 << 20
    reads: list[int] = []
    real = store._table.file.read
    store._table.file.read = lambda blocks, *rest: (reads.append(len(blocks)), real(blocks, *rest))  # type: ignore
    keys = torch.randint(0, 20_000_000, (500,)).unique()
    assert not store.fetch(keys).any()
    store.write(keys[:100], torch.ones(100, store.layout.nbytes, dtype=torch.uint8))
    store.flush()
    assert sum(reads) == 0 and path.stat().st_blocks * 512 < 4 << 20
    for part in torch.randint(0, 20_000_000, (8000,)).split(400):
        store.write(part.unique(), torch.ones(len(part.unique()), store.layout.nbytes, dtype=torch.uint8))
    store.flush()
    assert sum(reads) < 8000  # of those that came again, or whose block did
    assert (store.fetch(keys[:100]) == 1).all() and sum(reads) > 0


def test_the_cache_stays_within_its_budget_and_a_block_in_it_is_not_read_again(make: Make) -> None:
    store = make(35, {0: 400_000}, staging=2 << 20)
    assert len(store._table.cache.memory) == 2 << 20
    keys = torch.arange(0, 400_000, 100)
    for part in keys.split(500):
        store.write(part, torch.ones(len(part), store.layout.nbytes, dtype=torch.uint8))
    store.flush()
    reads: list[int] = []
    real = store._table.file.read
    store._table.file.read = lambda blocks, *rest: (reads.append(len(blocks)), real(blocks, *rest))  # type: ignore
    assert (store.fetch(keys[:100]) == 1).all()
    read = sum(reads)
    assert 0 < read <= 200
    assert (store.fetch(keys[:100]) == 1).all()
    store.write(keys[:100], torch.zeros(100, store.layout.nbytes, dtype=torch.uint8))
    store.flush()
    assert not store.fetch(keys[:100]).any() and sum(reads) == read


# -- disks that fail -------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Iterator[Callable[[Path], None]]:
    """Lets no file grow, or be written to, past the middle of a path's: what a full disk looks like to whoever
    writes there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda path: resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_nothing_is_acknowledged_after_it(
    way: str, make: Make, tmp_path: Path, full_disk: Callable[[Path], None]
) -> None:
    store = make()
    ones = torch.ones(ROWS, store.layout.nbytes, dtype=torch.uint8)
    store.write(ALL, ones)
    store.flush()
    full_disk(tmp_path / "rows" / "rows-00.safetensors")
    with pytest.raises(OSError, match=r"at byte [\d,]+: make room on its disk.*rows-00\.safetensors") as failed:
        store.write(ALL, 2 * ones)
        store.flush()
    assert failed.value.errno == errno.EFBIG
    known = store.acknowledged
    for _ in range(3):
        for again in (lambda: store.write(ALL[:5], ones[:5]), store.flush):
            with pytest.raises(OSError, match=r"rows-00\.safetensors"):
                again()
    assert store.acknowledged == known


def test_without_room_in_memory_and_on_disk_a_fetch_does_not_wait_for_ever(
    make: Make, tmp_path: Path, full_disk: Callable[[Path], None]
) -> None:
    """And never gives what the file has in place of what was written."""
    store = make()
    for part in ALL.split(200):
        store.write(part, torch.ones(len(part), store.layout.nbytes, dtype=torch.uint8))
    store.flush()
    full_disk(tmp_path / "rows" / "rows-00.safetensors")
    with pytest.raises(OSError, match="make room on its disk"):
        for number in range(50):
            rows = torch.arange(ROWS - 300, ROWS)
            store.write(keys_of(rows), torch.full((300, store.layout.nbytes), 2 + number, dtype=torch.uint8))
        store.flush()
    for rows in torch.arange(ROWS).split(100):
        try:
            found = store.fetch(keys_of(rows))
        except OSError as error:
            assert "make room" in str(error)
        else:
            assert (found == found[:, :1]).all() and (found[:, 0] > 0).all()


@pytest.mark.parametrize("where", ["fetch", "write"])
def test_a_read_error_names_the_file_and_ends_with_the_next_fetch(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    store, generator = make(), torch.Generator().manual_seed(0)
    expected = random_records(store, ROWS, generator)
    store.write(ALL, expected)
    store.flush()
    folder = os.open(tmp_path, os.O_RDONLY)  # reading a folder fails, as a disk would
    with monkeypatch.context() as patch:
        patch.setattr(store._table.file, "_direct", folder)
        if where == "fetch":
            for _ in range(3):
                with pytest.raises(OSError, match=r"at byte [\d,]+: check the disk.*rows-00\.safetensors"):
                    store.fetch(ALL)
        else:
            store.write(ALL, expected)
            with pytest.raises(OSError, match=r"rows-00\.safetensors"):
                store.flush()
    os.close(folder)
    assert torch.equal(store.fetch(ALL), expected)
    if where == "write":  # it was left out, and so is what comes after it
        for again in (lambda: store.write(ALL[:5], expected[:5]), store.flush):
            with pytest.raises(RuntimeError, match=r"write 2 to .*rows-00\.safetensors failed"):
                again()
        assert store.acknowledged == 1


def test_what_the_system_moves_in_pieces_is_moved_whole(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, generator = make(), torch.Generator().manual_seed(0)
    kind = store._table.file._kind

    def half(writes: bool) -> Callable[..., np.ndarray]:
        real = kind(writes)
        return lambda descriptors, starts, sizes, *rest: real(descriptors, starts, sizes // 2 // 512 * 512, *rest)

    monkeypatch.setattr(store._table.file, "_kind", half)
    expected = random_records(store, ROWS, generator)
    store.write(ALL, expected)
    store.flush()
    assert torch.equal(store.fetch(ALL), expected)


def test_without_direct_or_asynchronous_io_there_is_one_warning(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (name, told) in enumerate(
        (("open_direct", "has no direct I/O"), ("AioTransfer", "no asynchronous I/O"))
    ):
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match=told) as warned:
            patch.setattr(working_file, name, unavailable)
            store = make(folder=f"rows-{number}")
            store.write(ALL, torch.ones(ROWS, store.layout.nbytes, dtype=torch.uint8))
            store.flush()
            assert (store.fetch(ALL) == 1).all()
        assert len(warned) == 1


# -- the file's life -------------------------------------------------------------------------------------------------


def test_the_file_goes_with_its_store_and_so_does_its_folder(make: Make, tmp_path: Path) -> None:
    store = make()
    path = tmp_path / "rows" / "rows-00.safetensors"
    assert path.exists()
    with pytest.raises(ValueError, match=r"Another process or bank trains rows in .*rows: wait for its end"):
        make()
    other = make(spaces={1: 10})  # of another width, say
    store.write(ALL, torch.ones(ROWS, store.layout.nbytes, dtype=torch.uint8))
    del store
    for _ in range(100):  # what was under way ends first
        if not path.exists():
            break
        time.sleep(0.05)
    assert os.listdir(tmp_path / "rows") == ["rows-01.safetensors"]
    assert not make().fetch(ALL).any()
    del other
    assert not (tmp_path / "rows").exists()


PROCESS = """
import os, signal, sys, torch
from pathlib import Path
from torch_engram.stores import DiskTable, Plane, RecordLayout
try:
    store = DiskTable(RecordLayout((Plane("value", 34), Plane("count", 1, "int32"))), {0: 1500}, Path(sys.argv[1]))
except ValueError as error:
    sys.exit(str(error))
store.write(torch.arange(1500), torch.ones(1500, store.layout.nbytes, dtype=torch.uint8))
if sys.argv[2] == "killed":
    store.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def other_process(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROCESS, str(folder), how], capture_output=True, text=True)


def test_two_processes_do_not_share_a_folder_and_what_a_killed_one_left_is_replaced(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    assert other_process(folder, "killed").returncode == -9
    left = folder / "rows-00.safetensors"
    assert left.stat().st_blocks * 512 > 1500 * 100
    store = make(spaces={0: 1500})
    assert not store.fetch(torch.arange(1500)).any() and left.stat().st_blocks * 512 <= 2 * BLOCK
    refused = other_process(folder, "ends")
    assert refused.returncode == 1 and "Another process or bank trains rows in" in refused.stderr
    del store
    ended = other_process(folder, "ends")
    assert ended.returncode == 0, ended.stderr
    assert not folder.exists()


def test_stores_that_come_and_go_in_one_folder_never_share_it(tmp_path: Path) -> None:
    """Each removes file and folder, when others are about to open them."""
    program = """
import sys, torch
from pathlib import Path
from torch_engram.stores import DiskTable, Plane, RecordLayout
done, keys = 0, torch.arange(50)
while done < 15:
    try:
        store = DiskTable(RecordLayout((Plane("value", 2),)), {0: 50}, Path(sys.argv[1]), 0)
    except ValueError:
        continue
    assert not store.fetch(keys).any()
    store.write(keys, torch.ones(50, 8, dtype=torch.uint8))
    store.flush()
    assert (store.fetch(keys) == 1).all()
    done += 1
    del store
"""
    command = [sys.executable, "-c", program, str(tmp_path / "rows")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]  # of both, before any of it fails
    assert said == ["", ""] and [process.returncode for process in both] == [0, 0]
    assert not (tmp_path / "rows").exists()


def test_a_folder_that_another_store_removes_while_it_is_looked_for_is_made_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, make_one = tmp_path / "rows", os.mkdir
    folder.mkdir()

    def late(path: Path, mode: int = 0o777) -> None:
        try:
            make_one(path, mode)
        except FileExistsError:
            folder.rmdir()
            raise

    monkeypatch.setattr(os, "mkdir", late)
    assert not make().fetch(ALL).any()


@pytest.mark.parametrize("other", ["file", "link to nowhere"])
def test_what_is_no_folder_but_is_called_so_is_named(make: Make, tmp_path: Path, other: str) -> None:
    if other == "file":
        (tmp_path / "rows").write_text("")
    else:
        (tmp_path / "rows").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="rows"):
        make()


def test_a_forked_process_is_refused_and_leaves_the_file(make: Make, tmp_path: Path) -> None:
    store = make()
    child = os.fork()
    if not child:
        code = 1
        try:
            store.fetch(ALL)
        except ValueError as error:
            del store
            code = 0 if "before this process was forked off" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "rows" / "rows-00.safetensors").exists()
    assert not store.fetch(ALL).any()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        DiskTable(layout_of(4), {0: 10}, tmp_path / "file" / "rows")
