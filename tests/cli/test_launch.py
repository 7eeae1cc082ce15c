"""Which reason of several ranks a user is told, and what ``--nproc`` refuses before any rank starts."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from torch.distributed.elastic.multiprocessing import ProcessFailure
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from torch_engram.cli.launch import _reason

Fail = Callable[..., ProcessFailure]


@pytest.fixture
def fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fail:
    def make(rank: int, exitcode: int, told: Exception | None = None) -> ProcessFailure:
        path = tmp_path / f"{rank}.json"
        if told is not None:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
            ErrorHandler().record_exception(told)
        return ProcessFailure(rank, 1, exitcode, str(path))

    return make


def reason(*failures: ProcessFailure) -> Exception:
    return _reason({failure.local_rank: failure for failure in failures})


def test_a_mistake_goes_before_what_it_led_to(fail):
    told = reason(fail(0, -signal.SIGKILL), fail(1, 1, RuntimeError("odd")), fail(2, 1, ValueError("Lower the rates.")))
    assert type(told) is ValueError and str(told) == "Lower the rates."


def test_a_kill_goes_before_errors_of_others(fail):
    told = reason(fail(0, 1, RuntimeError("odd")), fail(1, -signal.SIGTERM), fail(2, -signal.SIGSEGV))
    assert str(told) == "Rank 2 was stopped (SIGSEGV); the newest checkpoint is whole: go on with --resume."


def test_an_error_of_ours_keeps_its_traceback(fail):
    told = reason(fail(0, 1), fail(1, 1, TypeError("odd")))
    assert type(told) is RuntimeError and str(told) == "Rank 1 failed: TypeError: odd"
    assert told.__notes__


def test_ranks_that_only_lost_each_other(fail):
    assert str(reason(fail(0, 1), fail(1, -signal.SIGTERM))).startswith("Rank 0 was stopped (exit code 1); ")
    lost = ConnectionError("NCCL error: unhandled system error")
    told = str(reason(fail(0, 1, lost), fail(1, -signal.SIGTERM)))
    assert told.startswith(
        "The ranks lost each other, and none says why it stopped (NCCL error: unhandled system error); "
    )
    assert str(reason(fail(0, 1, lost), fail(1, -signal.SIGKILL))).startswith("Rank 1 was stopped (SIGKILL")
    assert str(reason(fail(0, 1, lost), fail(1, 1, TypeError("odd")))) == "Rank 1 failed: TypeError: odd"


def test_an_interruption_is_none(fail):
    told = reason(fail(0, -signal.SIGTERM), fail(1, 130))
    assert isinstance(told, typer.Exit) and told.exit_code == 130


def test_mistakes_are_told_before_a_rank_starts(engram, monkeypatch):
    done = engram("train", "tiny", "--nproc", "2", "--set", "steps=many")
    assert done.code == 1 and done.err == "engram: steps is 'many': it must be a whole number."
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    done = engram("train", "tiny", "--nproc", "2", "--set", "device=cuda")
    assert done.err == "engram: 2 ranks with device=cuda need a GPU each, and PyTorch sees 1: start 1."
    done = engram("train", "tiny", "--nproc", "2", "--set", "device=cuda", "--set", "capture=true")
    assert done.err.startswith("engram: capture=true is for one process, for a graph would hold the collectives of 2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = engram("train", "tiny", "--nproc", "2")
    assert done.err.startswith("engram: This is one of 2 ranks already: leave out --nproc, or start the command")
