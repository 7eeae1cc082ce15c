"""A grid of runs and its log: what the log lacks is run, by several processes where asked, and logged as it comes.

A run is a frozen dataclass of plain values, which is all that decides its results. The log has one line of JSON a
result; whoever is interrupted starts again, and the runs that had not ended begin anew.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_engram.analysis.origin import ORIGIN, origin, revision
from torch_engram.durable import alone_in, replacing

LOG_FILE = "runs.jsonl"
_WATCH_SECONDS = 1
Line = dict[str, Any]
"""``run``, its fields; ``result``, and where it comes from; or, after the last of them, ``ended``, their number."""
Do = Callable[[Any], Iterable[dict[str, Any]]]
"""Runs a run, and yields its results as JSON takes them."""


def run_grid(
    runs: Sequence[Any], do: Do, out: Path, *, study: str, scale: str, device: str, workers: int = 1
) -> list[Line]:
    """The log's lines of the results of ``runs``, in their order.

    ``study`` and ``scale``: their names, for whoever reads the log. ``do``: of a module, where there are several
    ``workers``, processes that share the device. A run that fails leaves the others be, and is raised at the end.
    Raises ``ValueError`` where another grid is being run in ``out``, for a log that is none, and for one of another
    study or scale.
    """
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(alone_in(out, wait=False))
        except BlockingIOError as error:
            raise ValueError(f"Another process runs a study in {out}: wait for it, or give another --out.") from error
        known = _ended(read_log(out))
        _require_same(known, study, scale, out)
        _rewrite(out, known.values())  # of runs that had not ended, nothing is kept
        missing = list({key: run for run in runs if (key := _key(_plain(run))) not in known}.values())
        where = {"study": study, "scale": scale, **dict(zip(ORIGIN, origin(device), strict=True)), "code": revision()}
        one = _LoggedRun(do, out / LOG_FILE, where)
        failed = _run_here(missing, one) if workers == 1 else _run_beside(missing, one, workers)
        known = _ended(read_log(out))  # now in the grid's order, whichever ended first; runs of other grids behind
        _rewrite(out, [*(known.pop(_key(_plain(run)), []) for run in runs), *known.values()])
        if failed:
            raise failed[0]
    return results(runs, out)


def results(runs: Sequence[Any], out: Path) -> list[Line]:
    """The lines that a folder's log has of the results of ``runs``, in their order; none of a run that has not ended.

    Raises ``ValueError`` as :func:`read_log` does.
    """
    known = _ended(read_log(out))
    return [line for run in runs for line in known.get(_key(_plain(run)), []) if "result" in line]


def all_results(out: Path) -> list[Line]:
    """Those of all runs that have ended, in the log's order. Raises ``ValueError`` as :func:`read_log` does, and where
    there are none."""
    lines = [line for lines in _ended(read_log(out)).values() for line in lines if "result" in line]
    if not lines or "study" not in lines[0]:
        raise ValueError(f"{out} has no results of a study: give the --out of one that was run.")
    return lines


def read_log(out: Path) -> list[Line]:
    """The lines of a folder's log, oldest first; a last one that was cut off is left out.

    Raises ``ValueError`` for a file that is no such log.
    """
    path, lines = out / LOG_FILE, list[Line]()
    texts = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, text in enumerate(texts[:-1], 1):
        try:
            line = json.loads(text)
            if "run" not in line:
                raise ValueError("no run")
        except (ValueError, TypeError) as error:
            raise ValueError(f"Line {number} of {path} is no run of a study: give another --out.") from error
        lines.append(line)
    return lines


@dataclass(frozen=True)
class _LoggedRun:
    """Runs a run, and writes each result at once."""

    do: Do
    log: Path
    where: dict[str, str]

    def __call__(self, run: Any) -> None:
        count = 0
        try:
            for result in self.do(run):
                self._write({"run": _plain(run), "result": result, **self.where})
                count += 1
        finally:  # other processes want the device's memory
            gc.collect()
            torch.cuda.empty_cache()
        self._write({"run": _plain(run), "ended": count})

    def _write(self, line: Line) -> None:
        """One append, which other processes' lines do not cut."""
        with open(self.log, "ab", buffering=0) as file:
            file.write(_text(line).encode())
            os.fsync(file.fileno())


def _run_here(runs: Sequence[Any], one: _LoggedRun) -> list[Exception]:
    """One after the other; returns what went wrong."""
    failed = []
    for run in runs:
        try:
            one(run)
        except Exception as error:
            failed.append(error)
    return failed


def _run_beside(runs: Sequence[Any], one: _LoggedRun, workers: int) -> list[Exception]:
    """In processes of their own, which a GPU's contexts want to be spawned; returns what went wrong."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        begun = [pool.submit(one, run) for run in runs]
        try:
            errors = [future.exception() for future in begun]
        except BaseException:  # Ctrl-C: the runs under way are the last
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [error for error in errors if isinstance(error, Exception)]


def _end_with(parent: int) -> None:
    """Let this process end soon after its parent, so that a killed grid's runs do not go on beside the next grid's."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ended(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines of the runs that came to their end with all their results, by run. Of one that ended twice, as where a
    killed grid's process went on beside the next grid, the first."""
    waiting: dict[str, list[Line]] = {}
    found: dict[str, list[Line]] = {}
    for line in lines:
        key = _key(line["run"])
        if "ended" not in line:
            waiting.setdefault(key, []).append(line)
            continue
        held, count = waiting.pop(key, []), line["ended"]
        if len(held) >= count and key not in found:
            found[key] = [*held[len(held) - count :], line]
    return found


def _require_same(known: Mapping[str, Sequence[Line]], study: str, scale: str, out: Path) -> None:
    for line, *_ in known.values():
        held = line.get("study"), line.get("scale")
        if "result" in line and held != (study, scale):
            raise ValueError(f"{out} holds runs of the study {held[0]} at scale {held[1]}: give another --out.")


def _rewrite(out: Path, runs: Iterable[Sequence[Line]]) -> None:
    with replacing(out / LOG_FILE) as file:
        file.write("".join(_text(line) for lines in runs for line in lines).encode())


def _plain(run: Any) -> dict[str, Any]:
    """A run as the log has it: tuples are lists there."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(run)))
    return plain


def _key(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


def _text(line: Line) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
