"""Metrics of a run: a line of JSON each, and the same to a tracker where one was asked for."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch_engram.durable import is_left_over, replacing
from torch_engram.train.recipe import Recipe

METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
    """Somewhere else that wants the numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the values of one step."""

    def close(self) -> None:
        """Send what is left."""


class NoMetrics:
    """Of ranks that keep none."""

    def log(self, step: int, **values: float) -> None:
        """See :class:`Metrics`."""

    def close(self) -> None:
        """See :class:`Metrics`."""


class Metrics(NoMetrics):
    """Appends to ``folder/metrics.jsonl``; lines beyond ``step``, of a run that is resumed from there, are dropped.

    Raises ``ValueError`` when the recipe's tracker is not installed.
    """

    def __init__(self, folder: Path, recipe: Recipe, step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self._trackers: list[Tracker] = [] if recipe.tracker == "none" else [_TRACKERS[recipe.tracker](recipe, folder)]
        self.path = folder / METRICS_FILE
        for left in folder.iterdir():
            if is_left_over(left, METRICS_FILE):
                left.unlink()
        kept = [line for line in read_metrics(folder) if line["step"] <= step] if step else []
        with replacing(self.path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(self.path, "a")  # noqa: SIM115 - closed by close()

    def log(self, step: int, **values: float) -> None:
        """Write one line. Raises ``ValueError`` when the disk is full."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise ValueError(f"Cannot write {self.path} ({error.strerror}): make room, or set another out.") from error
        for tracker in self._trackers:
            tracker.log(values, step)

    def close(self) -> None:
        """Close the file and the tracker."""
        with contextlib.suppress(OSError):  # of a line that could not be written, and has raised
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines that a run has written so far; a last line that was cut off is left out."""
    path = folder / METRICS_FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _import(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"tracker={package} needs the package {package!r}: pip install {package}, or tracker=none."
        ) from error


class _Trackio:
    def __init__(self, recipe: Recipe, folder: Path):
        self._trackio = _import("trackio", "trackio")
        self._trackio.init(project="torch-engram", name=recipe.name, config=recipe.to_dict())

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


class _TensorBoard:
    def __init__(self, recipe: Recipe, folder: Path):
        self._writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


_TRACKERS: dict[str, Callable[[Recipe, Path], Tracker]] = {"trackio": _Trackio, "tensorboard": _TensorBoard}
