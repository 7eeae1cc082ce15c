"""A grid of runs and its log: what the log lacks is run, by several processes where asked, and logged as it comes.

A run is a frozen dataclass of plain values, which is all that decides its results. The log has one line of JSON a
result; whoever is interrupted starts again, and the runs that had not ended begin anew.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_engram.analysis.origin import ORIGIN, origin, revision
from torch_engram.durable import replacing

LOG_FILE = "runs.jsonl"
Line = dict[str, Any]
"""``run``, its fields; ``result``, and where it comes from; or ``ended``, after the last of them."""
Do = Callable[[Any], Iterable[dict[str, Any]]]
"""Runs a run, and yields its results as JSON takes them."""


def run_grid(runs: Sequence[Any], do: Do, out: Path, *, device: str, workers: int = 1) -> list[Line]:
    """The log's lines of the results of ``runs``, in their order.

    ``do``: of a module, where there are several ``workers``, processes that share the device. A run that fails leaves
    the others be, and is raised at the end.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = _ended(read_log(out))
    with replacing(out / LOG_FILE) as file:  # of runs that had not ended, nothing is kept
        file.write("".join(_text(line) for lines in known.values() for line in lines).encode())
    missing = [run for run in runs if _key(_plain(run)) not in known]
    one = _LoggedRun(do, out / LOG_FILE, {**dict(zip(ORIGIN, origin(device), strict=True)), "code": revision()})
    if workers == 1:
        for run in missing:
            one(run)
    else:
        _run_beside(missing, one, workers)
    known = _ended(read_log(out))
    return [line for run in runs for line in known[_key(_plain(run))] if "result" in line]


def read_log(out: Path) -> list[Line]:
    """The lines of a folder's log, oldest first; one that was cut off is left out."""
    path, lines = out / LOG_FILE, []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


@dataclass(frozen=True)
class _LoggedRun:
    """Runs a run, and writes each result at once."""

    do: Do
    log: Path
    where: dict[str, str]

    def __call__(self, run: Any) -> None:
        for result in self.do(run):
            self._write({"run": _plain(run), "result": result, **self.where})
        self._write({"run": _plain(run), "ended": True})

    def _write(self, line: Line) -> None:
        """One append, which other processes' lines do not cut."""
        with open(self.log, "ab", buffering=0) as file:
            file.write(_text(line).encode())
            os.fsync(file.fileno())


def _run_beside(runs: Sequence[Any], one: _LoggedRun, workers: int) -> None:
    """In processes of their own, which a GPU's contexts want to be spawned."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        begun = [pool.submit(one, run) for run in runs]
        failed = [future.exception() for future in as_completed(begun)]
    for error in failed:
        if error is not None:
            raise error


def _ended(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines of the runs that came to their end, by run."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(_key(line["run"]), []).append(line)
    return {key: lines for key, lines in found.items() if "ended" in lines[-1]}


def _plain(run: Any) -> dict[str, Any]:
    """A run as the log has it: tuples are lists there."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(run)))
    return plain


def _key(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


def _text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
