"""Tasks of lm-evaluation-harness on a model with its memories: what it scores with them, and what without.

The harness needs nothing of ours: its class for models of transformers takes one with memories as it is. What is here
chooses the tasks, says in one sentence what is wrong with them, and runs them once more with the memories off.

Needs the extra ``eval``.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from torch_engram.hub.attached import memories_of

_KEPT = ("results", "groups", "n-shot", "n-samples", "higher_is_better", "versions", "lm_eval_version")
"""What is kept of the harness's own results: the rest repeats the tasks' files, and tells of the machine."""


@dataclass(frozen=True)
class Evaluation:
    """Results by the harness's own names; ``results`` in them has those by task and metric."""

    with_memories: dict[str, Any]
    without: dict[str, Any] | None
    """With all memories disabled; None where it was not asked for."""

    def scores(self) -> Iterator[Score]:
        """One a task and metric."""
        for task, found in self.with_memories["results"].items():
            for key, value in found.items():
                metric, _, filtered = key.partition(",")
                if not filtered or metric.endswith("_stderr") or not isinstance(value, float):
                    continue
                error = found.get(f"{metric}_stderr,{filtered}")
                yield Score(
                    task,
                    metric if filtered == "none" else f"{metric} ({filtered})",
                    value,
                    error if isinstance(error, float) else None,
                    None if self.without is None else self.without["results"][task][key],
                    self.with_memories["higher_is_better"].get(task, {}).get(metric),
                )


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    error: float | None
    """Its standard error."""
    without: float | None
    """The value with all memories disabled."""
    higher_is_better: bool | None


@dataclass(frozen=True)
class Tasks:
    """Tasks and groups of tasks that there are."""

    names: tuple[str, ...]
    manager: Any
    """The harness's ``TaskManager`` that knows them."""


def find_tasks(names: Sequence[str], include_path: str | os.PathLike[str] | None = None) -> Tasks:
    """The harness's tasks of these names, and those in the YAML files of the folder ``include_path``.

    Raises ``ValueError`` naming a task that is not there, or a package that is not installed.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"Evaluation needs the package {error.name}: pip install 'torch-engram[eval]', or '.[eval]' in a clone."
        ) from error
    folder = None if include_path is None else str(include_path)
    if folder is not None:
        if not Path(folder).is_dir():
            raise ValueError(f"There is no folder {folder}: give one with the YAML files of tasks.")
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return Tasks(tuple(names), own)  # the harness's own are thousands of files, which take seconds to list
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            mend = f"did you mean {close[0]!r}?" if close else "`lm-eval ls tasks` lists those there are."
            raise ValueError(f"There is no task {name!r}: {mend}")
    return Tasks(tuple(names), manager)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    compare: bool = False,
) -> Evaluation:
    """Run tasks on a model with its memories, and with ``compare`` once more with all of them disabled.

    ``limit``: examples of each task, at most. Raises ``OSError`` where a task's data cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def run() -> dict[str, Any]:
        found = lm_eval.simple_evaluate(
            harness, tasks=list(tasks.names), task_manager=tasks.manager, limit=limit, log_samples=False
        )
        assert found is not None  # as it is on ranks other than the first
        plain = json.dumps({key: found[key] for key in _KEPT if key in found}, default=float)  # of NumPy's numbers
        kept: dict[str, Any] = json.loads(plain)
        return kept

    with_memories = run()
    with ExitStack() as off:
        for memory in memories_of(model).values():
            off.enter_context(memory.disabled())
        return Evaluation(with_memories, run() if compare else None)
