"""``engram … --nproc``: the same command on several ranks of this machine, told as one.

:func:`launch` starts the ranks as ``torchrun`` does, in its environment, and waits. Rank 0 has the terminal; what the
others print is dropped. A rank that fails leaves its reason in the file that torch.distributed.elastic names, and ends
at once (:func:`as_rank`); all others are then stopped, and the first reason is raised here.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from typing import Any

import typer
from torch.distributed import DistError, ProcessGroup, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    ProcessFailure,
    SignalException,
    Std,
    start_processes,
)
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from torch_engram.cli.sentences import sentence
from torch_engram.train.guards import interruptible
from torch_engram.train.ranks import joined, require_gpus

_LAUNCHED = "ENGRAM_LAUNCHED"  # in the environment of ranks that launch() started, which tell their reason to it alone
_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_INTERRUPTED = 130
_MISTAKE, _LOST = "ValueError: ", "ConnectionError: "
_GOES_ON = "the newest checkpoint is whole: go on with --resume"


def launch(ranks: int, device: str, arguments: Sequence[str]) -> None:
    """Run ``engram`` with these arguments on so many ranks, each with a GPU where ``device`` is cuda. The first Ctrl-C
    is passed on to each of them, a second one ends them at once.

    Raises ``ValueError`` or ``RuntimeError`` with the reason of the rank that failed first, and ``typer.Exit`` after an
    interruption.
    """
    if device == "cuda":
        require_gpus(ranks)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = ("-m", "torch_engram.cli", *arguments)
    with TemporaryDirectory(prefix="engram-ranks-") as folder, _own_signals():
        context = start_processes(
            "engram",
            sys.executable,
            dict.fromkeys(range(ranks), command),
            {rank: _environment(rank, ranks, store.port) for rank in range(ranks)},
            DefaultLogsSpecs(folder, redirects={rank: Std.ALL if rank else Std.NONE for rank in range(ranks)}),
        )
        try:
            with interruptible(lambda: _interrupt(context.pids().values())):
                ended = context.wait(period=0.1)
        except SignalException as stopped:
            raise typer.Exit(128 + stopped.sigval) from None
        finally:
            context.close()
        assert ended is not None
        if ended.failures:
            raise _reason(ended.failures)


def _interrupt(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(pid, signal.SIGINT)


@contextmanager
def _own_signals() -> Iterator[None]:
    """What start_processes sets signals to, it sets for good; Ctrl-C it shall leave alone."""
    handled = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    os.environ[_SIGNALS] = ",".join(each.name for each in handled)
    before = {each: signal.getsignal(each) for each in handled}
    try:
        yield
    finally:
        del os.environ[_SIGNALS]
        for each, handler in before.items():
            signal.signal(each, handler)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """As ``torchrun`` has it; the ranks find each other by a store that this process keeps."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        _LAUNCHED: "1",
    }


def _reason(failures: Mapping[int, ProcessFailure]) -> Exception:
    """What began it: a mistake that was told, then a kill, then an error; others lost the rank that it happened to."""
    if any(failure.exitcode == _INTERRUPTED for failure in failures.values()):
        return typer.Exit(_INTERRUPTED)
    first = min(failures.values(), key=lambda failure: (_order(failure), failure.timestamp, failure.local_rank))
    rank, told = first.local_rank, _told(first)
    if told is not None and told["message"].startswith(_LOST):
        said = told["message"].removeprefix(_LOST)
        return RuntimeError(f"The ranks lost each other, and none says why it stopped ({said}); {_GOES_ON}.")
    if told is None:
        how = first.signal_name() if first.exitcode < 0 else f"exit code {first.exitcode}"
        hint = ", which the system does where memory runs out" if first.exitcode == -signal.SIGKILL else ""
        return ValueError(f"Rank {rank} was stopped ({how}{hint}); {_GOES_ON}.")
    mistake = told["message"].startswith(_MISTAKE)
    said = told["message"].removeprefix(_MISTAKE)
    error = ValueError(said) if mistake else RuntimeError(f"Rank {rank} failed: {said}")
    error.add_note(told["extraInfo"]["py_callstack"])
    return error


def _order(failure: ProcessFailure) -> int:
    told = _told(failure)
    if told is not None:
        return next((order for order, begins in ((0, _MISTAKE), (3, _LOST)) if told["message"].startswith(begins)), 2)
    return 1 if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM else 4


def _told(failure: ProcessFailure) -> Mapping[str, Any] | None:
    """What the rank left in its file, if it came to that."""
    message: object = failure.message
    return message if isinstance(message, Mapping) else None


@contextmanager
def as_rank(device: str) -> Iterator[ProcessGroup | None]:
    """The group of all ranks, for a process that was started as one of several.

    A rank that fails within ends at once: threads of its own may wait for other ranks, and they for this one.
    """
    try:
        with joined(device) as group:
            yield group
        return
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except Exception as error:
        _tell(error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(error: Exception) -> None:
    """Leave the reason for whoever started this rank; under ``torchrun`` also print it."""
    prints = _LAUNCHED not in os.environ or os.environ.get("ENGRAM_TRACEBACK") == "1"
    if isinstance(error, (ValueError, OSError)):
        said = sentence(error)
        ErrorHandler().record_exception(ValueError(said))
    elif isinstance(error, DistError) or any(word in str(error) for word in ("gloo/", "by peer", "NCCL")):
        said = f"Another rank stopped, and its own message says why; {_GOES_ON}."
        ErrorHandler().record_exception(ConnectionError(str(error).strip().partition("\n")[0]))
    else:
        said = traceback.format_exc()
        ErrorHandler().record_exception(error)
    if prints:
        print(f"engram: {said}", file=sys.stderr)
