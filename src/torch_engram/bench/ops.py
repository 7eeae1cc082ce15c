"""Hot spots one by one: each is checked against its twin, then timed against what its device could do at best.

An op is a function from :class:`Sizes` to :class:`Op`, registered with :func:`op`; the ones of this library are in
:mod:`torch_engram.bench.memory_ops` and :mod:`torch_engram.bench.network_ops`. Its limit is the bytes that it must move
at the device's measured copy rate, and the matrix products that it must do, as ``torch.mm`` does them. What a product
reads and writes is in the product's own time. The limit leaves out all that a better order of work could avoid.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_engram.bench.results import Measurement
from torch_engram.bench.timing import Shape, copy_rate, median, milliseconds, product_milliseconds
from torch_engram.config import nearest
from torch_engram.train.build import require_compiler

Work = Callable[[], Any]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What the twin's function goes through before it is timed: nothing, or the compiler."""
AGAINST = ("naive", "compile")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
"""Largest error, relative in norm to results in fp32."""
_TURNS = 3
"""In which an op and its twin are timed."""


@dataclass(frozen=True)
class Sizes:
    """What ops are timed on. Rows are of hidden / 16 numbers, 16 of them a token, as for an E of ``hidden``."""

    device: str
    dtype: torch.dtype
    tokens: int
    """Of a step; a multiple of 64."""
    hidden: int
    """A multiple of 128."""
    branches: int
    rows: int
    """Of the table of a layer."""
    vocab: int
    experts: int

    def __post_init__(self) -> None:
        for name, unit in (("tokens", 64), ("hidden", 128)):
            value = getattr(self, name)
            if value < unit or value % unit:
                raise ValueError(f"{name} is {value}: make it a multiple of {unit}, from {unit} on.")

    def describe(self) -> str:
        """One line for a table."""
        names = ("tokens", "hidden", "branches", "rows", "vocab", "experts")
        kind = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return " ".join([f"dtype={kind}", *(f"{name}={getattr(self, name)}" for name in names)])


DEFAULTS = {
    "cuda": Sizes("cuda", torch.bfloat16, 65_536, 1024, 4, 10_000_000, 16_384, 32),
    "cpu": Sizes("cpu", torch.float32, 1024, 128, 2, 20_000, 1024, 8),
}


@dataclass(frozen=True)
class Op:
    """One hot spot, its inputs made."""

    ours: Work
    naive: Callable[[Wrap], Work]
    """The twin, the part of it that a compiler takes wrapped."""
    results: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    """What comes out, and what should: whole numbers equal, others within ``tolerance``."""
    moved: float
    """Bytes outside of matrix products, each counted once."""
    products: Sequence[Shape] = ()
    tolerance: float = TOLERANCE[torch.float32]
    product_dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Timed:
    """What an op reached."""

    name: str
    ours: list[float]
    """Milliseconds, one a call."""
    limit: float
    against: list[float] | None = None
    """Milliseconds of the twin."""

    @property
    def ratio(self) -> float:
        """Our time over the limit."""
        return median(self.ours) / self.limit

    @property
    def speed_up(self) -> float | None:
        """The twin's time over ours."""
        return None if self.against is None else median(self.against) / median(self.ours)

    def measurements(self, against: str | None) -> Iterator[Measurement]:
        """Our time and the twin's over the limit, and the one over the other."""
        yield Measurement("ours", self.ours, "ms", self.limit, self.ratio)
        if self.against is not None:
            twin, ours = median(self.against), median(self.ours)
            speeds = [took / ours for took in self.against]
            yield Measurement(f"{against}", self.against, "ms", self.limit, twin / self.limit)
            yield Measurement(f"{against}-over-ours", speeds, "times", 1.0, twin / ours)


OPS: dict[str, Callable[[Sizes], Op]] = {}


def op(function: Callable[[Sizes], Op]) -> Callable[[Sizes], Op]:
    """Register an op under its function's name, underscores as dashes; its docstring says what its limit counts."""
    OPS[function.__name__.replace("_", "-")] = function
    return function


def choose_ops(names: Sequence[str]) -> list[str]:
    """The ops of these names, or all of them. Raises ``ValueError`` with the nearest name for one that is none."""
    for name in names:
        if name not in OPS:
            raise ValueError(f"There is no op {name!r}: {nearest(name, OPS)}")
    return [name for name in OPS if not names or name in names]


class Stand:
    """Where ops are timed: their sizes, and the copy rate of the device, which is measured first."""

    def __init__(self, sizes: Sizes, against: str | None = None, repeats: int = 30):
        require_against(against)
        self.sizes, self.against, self.repeats = sizes, against, repeats
        self.copy_rate = copy_rate(sizes.device)
        """Bytes a millisecond."""

    def time(self, name: str) -> Timed:
        """Check an op, then time it. Raises ``ValueError`` for one that is wrong or does not fit into memory."""
        torch.manual_seed(0)
        try:
            made = OPS[name](self.sizes)
            require_right(name, made)
            twin = None if self.against is None else self._twin(name, made)
            ours, against = self._in_turns(made.ours, twin)
            return Timed(name, ours, self._limit(made), against)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_about_memory(error):
                raise
            raise ValueError(f"{name} and its twin do not fit into memory: lower --tokens or --hidden.") from error

    def _in_turns(self, ours: Work, twin: Work | None) -> tuple[list[float], list[float] | None]:
        """Milliseconds of both, a part of the calls each turn, so that what changes meanwhile changes for both."""
        of_ours: list[float] = []
        of_twin: list[float] = []
        turns = min(_TURNS, self.repeats)
        for turn in range(turns):
            calls = self.repeats * (turn + 1) // turns - self.repeats * turn // turns
            of_ours += milliseconds(ours, calls, 3, self.sizes.device)
            if twin is not None:
                of_twin += milliseconds(twin, calls, 3, self.sizes.device)
        return of_ours, of_twin or None

    def _twin(self, name: str, made: Op) -> Work | None:
        """The twin's work, past its first call."""
        if self.against == "naive":
            return made.naive(lambda function: function)
        torch._dynamo.reset()  # what other ops compiled counts towards this one's limit of variants
        try:
            with _quiet_compiler():
                work = made.naive(lambda function: torch.compile(function, dynamic=False))
                work()
            return work
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n", 2)[:2]).strip()  # the second line says why, where there is one
            warnings.warn(f"torch.compile cannot compile the plain form of {name}: {reason}", stacklevel=2)
            return None

    def _limit(self, made: Op) -> float:
        device, dtype = self.sizes.device, made.product_dtype
        products = {shape: median(product_milliseconds(shape, dtype, device)) for shape in set(made.products)}
        return made.moved / self.copy_rate + sum(products[shape] for shape in made.products)


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Its advice on how to write what it compiles is not for whoever times it."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._inductor")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def require_against(against: str | None) -> None:
    """Raises ``ValueError`` for a form that there is not, or that this machine cannot make."""
    if against is not None and against not in AGAINST:
        raise ValueError(f"There is nothing to compare with named {against!r}: {nearest(against, AGAINST)}")
    if against == "compile":
        require_compiler("--against compile", "use --against naive")


def _is_about_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def with_sizes(device: str, dtype: str | None, **given: int | None) -> Sizes:
    """The device's defaults with what is given in their place. Raises ``ValueError`` for a size that does not do."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"There is no dtype {dtype!r}: {nearest(dtype, DTYPES)}")
    if device not in DEFAULTS:
        raise ValueError(f"There is no device {device!r}: use 'cpu' or 'cuda'.")
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if dtype is not None:
        fields["dtype"] = DTYPES[dtype]
    return replace(DEFAULTS[device], **fields)


def require_right(name: str, made: Op) -> None:
    """Raises ``ValueError`` when an op's results are not those of its twin: a wrong kernel has no speed."""
    for number, (got, expected) in enumerate(made.results()):
        off = error(got, expected)
        if not off <= made.tolerance:
            raise ValueError(
                f"{name} is wrong on this device: result {number} is off by {off:.2g} of its size where "
                f"{made.tolerance:.2g} is allowed, so it is not timed; please report this with your GPU and versions."
            )


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; of whole numbers 0 or infinity."""
    if got.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(got.long(), expected.long()) else float("inf")
    got, expected = got.detach().float(), expected.detach().float()
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-30))


def nbytes(*tensors: Tensor) -> int:
    """Bytes of tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
