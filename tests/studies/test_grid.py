"""A grid that was interrupted ends with the lines of one that was not, and what its log holds is not run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from torch_engram.durable import alone_in
from torch_engram.studies.grid import LOG_FILE, all_results, read_log, run_grid


@dataclass(frozen=True)
class Squares:
    """Yields so many squares."""

    count: int
    shape: tuple[int, ...] = (1, 2)


def squares(run: Squares) -> Iterator[dict[str, Any]]:
    for number in range(run.count):
        yield {"square": number * number}


def failing(run: Squares) -> Iterator[dict[str, Any]]:
    yield {"square": 0}
    if run.count == 1:
        raise ValueError("One is not to be squared.")


def results(lines: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(line["run"]["count"], line["result"]["square"]) for line in lines]


OF: dict[str, Any] = {"study": "squares", "scale": "any", "device": "cpu"}
GRID = [Squares(3), Squares(1), Squares(2)]
WHOLE = [(3, 0), (3, 1), (3, 4), (1, 0), (2, 0), (2, 1)]


def test_lines_are_in_the_grid_s_order_and_say_where_they_come_from(tmp_path):
    lines = run_grid(GRID, squares, tmp_path, **OF)
    assert results(lines) == WHOLE
    assert all(line[part] for line in lines for part in ("device", "versions", "date", "code"))


def test_nothing_is_run_twice(tmp_path):
    first = run_grid(GRID, squares, tmp_path, **OF)
    assert run_grid(GRID[:2], failing, tmp_path, **OF) == first[:4]
    assert results(run_grid([Squares(1, shape=(9,))], squares, tmp_path, **OF)) == [(1, 0)]
    assert results([line for line in read_log(tmp_path) if "result" in line]) == [(1, 0), *WHOLE]


def test_a_log_is_in_the_grid_s_order_whatever_ended_first(tmp_path):
    run_grid(GRID[::-1], squares, tmp_path, **OF)
    assert results(all_results(tmp_path)) == [*WHOLE[4:], *WHOLE[3:4], *WHOLE[:3]]
    run_grid(GRID, failing, tmp_path, **OF)
    assert results(all_results(tmp_path)) == WHOLE


@pytest.mark.parametrize("other", [{"study": "cubes"}, {"scale": "small"}])
def test_a_folder_is_one_study_s_at_one_scale(tmp_path, other):
    run_grid(GRID, squares, tmp_path, **OF)
    log = (tmp_path / LOG_FILE).read_bytes()
    with pytest.raises(ValueError, match="holds runs of the study squares at scale any: give another --out"):
        run_grid(GRID, squares, tmp_path, **{**OF, **other})
    assert (tmp_path / LOG_FILE).read_bytes() == log


def test_results_are_of_runs_that_have_ended(tmp_path):
    with pytest.raises(ValueError, match="has no results of a study"):
        all_results(tmp_path)
    with pytest.raises(ValueError, match="One is not"):
        run_grid([Squares(2), Squares(1)], failing, tmp_path, **OF)
    assert results(all_results(tmp_path)) == [(2, 0)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_fails_leaves_the_others_be_and_is_run_again_whole(tmp_path, workers):
    with pytest.raises(ValueError, match="One is not"):
        run_grid([Squares(1), Squares(2)], failing, tmp_path, **OF, workers=workers)
    assert results(run_grid([Squares(1), Squares(2)], squares, tmp_path, **OF)) == [
        (1, 0),
        (2, 0),
    ]
    assert len([line for line in read_log(tmp_path) if "ended" in line]) == 2


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_log_that_was_cut_off_is_as_good_as_one_of_fewer_runs(tmp_path, cut):
    whole = run_grid(GRID, squares, tmp_path, **OF)
    log = tmp_path / LOG_FILE
    log.write_bytes(log.read_bytes()[:-cut])
    assert run_grid(GRID, squares, tmp_path, **OF) == whole
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_results_are_on_disk_before_the_run_has_ended(tmp_path):
    program = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_grid import OF, Squares, run_grid
        def killed(run):
            yield {{"square": 0}}
            os.kill(os.getpid(), signal.SIGKILL)
        run_grid([Squares(2)], killed, Path({str(tmp_path)!r}), **OF)
    """)
    done = subprocess.run([sys.executable, "-c", program], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert [line["result"] for line in read_log(tmp_path)] == [{"square": 0}]
    assert results(run_grid([Squares(2)], squares, tmp_path, **OF)) == [
        (2, 0),
        (2, 1),
    ]


def test_a_run_that_lost_a_result_has_not_ended(tmp_path):
    run_grid([Squares(3)], squares, tmp_path, **OF)
    log = tmp_path / LOG_FILE
    log.write_text("".join(log.read_text().splitlines(keepends=True)[1:]))
    assert results(run_grid([Squares(3)], squares, tmp_path, **OF)) == [
        (3, 0),
        (3, 1),
        (3, 4),
    ]


def test_a_run_that_ended_twice_counts_once(tmp_path):
    run_grid(GRID, squares, tmp_path, **OF)
    log = tmp_path / LOG_FILE
    log.write_text(log.read_text() * 2)
    assert results(run_grid(GRID, failing, tmp_path, **OF)) == WHOLE
    assert results(run_grid([Squares(2), Squares(2)], squares, tmp_path / "same", **OF)) == 2 * [(2, 0), (2, 1)]


def sleeping(run: Squares) -> Iterator[dict[str, Any]]:
    (Path(os.environ["PIDS"]) / str(os.getpid())).touch()
    time.sleep(60)
    yield {"square": 0}


def test_workers_end_with_a_grid_that_was_killed(tmp_path):
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_grid import OF, Squares, run_grid, sleeping
        if __name__ == "__main__":
            run_grid([Squares(1), Squares(2)], sleeping, Path({str(tmp_path)!r}), workers=2, **OF)
    """)
    (tmp_path / "grid.py").write_text(program)
    pids = tmp_path / "pids"
    pids.mkdir()
    parent = subprocess.Popen([sys.executable, tmp_path / "grid.py"], env={**os.environ, "PIDS": str(pids)})
    try:
        wait_until(lambda: len(list(pids.iterdir())) == 2)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(Path(f"/proc/{path.name}").exists() for path in pids.iterdir()))


def wait_until(reached: Callable[[], bool]) -> None:
    for _ in range(600):
        if reached():
            return
        time.sleep(0.1)
    raise AssertionError("Not reached within a minute.")


@pytest.mark.parametrize("text", ["my notes\n", '{"step": 1}\n', "[1]\n"])
def test_a_file_that_is_no_log_is_left_as_it_is(tmp_path, text):
    (tmp_path / LOG_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"Line 1 of .*runs.jsonl is no run of a study: give another --out"):
        run_grid(GRID, squares, tmp_path, **OF)
    assert (tmp_path / LOG_FILE).read_text() == text


def test_two_grids_do_not_share_a_folder(tmp_path):
    with alone_in(tmp_path, wait=False), pytest.raises(ValueError, match="Another process runs a study in"):
        run_grid(GRID, squares, tmp_path, **OF)
