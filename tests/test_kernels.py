"""Under ``naive()`` no kernel is launched, in no place and from no thread; otherwise a GPU runs them all.

Without a GPU, tensors of the CPU are given out as a GPU's, and Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from torch_engram import kernels
from torch_engram.config import EngramConfig
from torch_engram.fusion import fused
from torch_engram.kernels import naive, use_kernels
from torch_engram.memory import MemoryBank, Tokens
from torch_engram.models import Decoder, DecoderConfig, MoEConfig
from torch_engram.optim import RowwiseAdam
from torch_engram.train.loss import head_loss

SOURCE = Path(kernels.__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENGRAM = EngramConfig(layers=(0,), hidden=16, vocab_size=50, heads=2, row_dim=4, rows_per_head=40, branches=2)
MODEL = DecoderConfig(
    vocab_size=64, hidden=16, layers=1, heads=2, ffn_hidden=16, branches=2, sinkhorn_iterations=3, tie_embeddings=False,
    moe=MoEConfig(experts=4, top_k=2, expert_hidden=16, shared_hidden=16), engrams={"engram": ENGRAM},
)  # fmt: skip


class Here:
    """Does on the caller's thread what a prefetch thread would: the interpreter takes one thread only."""

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Which kernels were launched, and how often."""
    counts: Counter[str] = Counter()
    if DEVICE.type == "cuda":
        owner, name = triton.runtime.jit.JITFunction, "run"
    else:
        from triton.runtime.interpreter import GridExecutor as owner

        name = "__call__"
        monkeypatch.setattr(kernels, "_on_gpu", lambda tensor: True)
        monkeypatch.setattr(fused, "_STEPS", 5)  # the interpreter walks all of them, however few tokens there are
    real = getattr(owner, name)

    def count(self: Any, *arguments: Any, **options: Any) -> Any:
        counts[self.fn.__name__] += 1
        return real(self, *arguments, **options)

    monkeypatch.setattr(owner, name, count)
    return counts


def train(make_vocab: Any) -> list[float]:
    """The losses of two steps of a decoder that has one of everything."""
    torch.manual_seed(0)
    decoder = Decoder(MODEL).to(DEVICE)
    bank = MemoryBank(ENGRAM, make_vocab(60, 50), optimizer=RowwiseAdam, codec="bf16", device=DEVICE)
    if DEVICE.type == "cpu":
        bank._prefetcher._worker = Here()  # type: ignore[assignment]
    tokens = torch.randint(60, (2, 6))
    losses, size = [], torch.tensor(float(tokens.numel()), device=DEVICE)
    ahead = bank.prefetch(Tokens(tokens))
    for _ in range(2):
        rows, ahead = ahead, bank.prefetch(Tokens(tokens))  # fetched before the step writes: patched in the next one
        hidden = decoder(tokens.to(DEVICE), rows[0], return_hidden=True)
        loss = head_loss(hidden[:, :-1], decoder.head.weight, tokens[:, 1:].to(DEVICE), None, size)
        loss.backward()
        rows.reduce()
        rows.apply()
        losses.append(loss.item())
    bank.settle()
    return losses


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, for lanes that are masked
def test_naive_launches_nothing_and_trains_the_same(launched: Counter[str], make_vocab: Any) -> None:
    with naive():
        expected = train(make_vocab)
        assert not launched
    assert train(make_vocab) == pytest.approx(expected, rel=2e-3)
    rooms = {"_address", "_expand", "_rowwise_adam", "_measure", "_key_gradients"}
    assert rooms <= set(launched) and len(launched) > 20, sorted(launched)


def test_blocks_nest_and_end_with_an_error() -> None:
    tensor = torch.zeros((), device=DEVICE)
    before = use_kernels(tensor)
    with pytest.raises(RuntimeError), naive():
        with naive():
            pass
        assert not use_kernels(tensor)
        raise RuntimeError
    assert use_kernels(tensor) == before == (DEVICE.type == "cuda")


def test_compiled_code_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole in one graph, and traced anew when the answer changes."""
    monkeypatch.setattr(kernels, "_on_gpu", lambda tensor: True)

    @torch.compile(backend="eager", fullgraph=True)
    def choose(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if use_kernels(x) else x - 1

    x = torch.zeros(3)
    assert choose(x)[0] == 1
    with naive():
        assert choose(x)[0] == -1
    assert choose(x)[0] == 1


FOLLOW = {
    "addressing/ngrams.py": 3,
    "stores/decoded.py": 1,
    "stores/host_writes.py": 1,
    "optim/adagrad.py": 1,
    "optim/adam.py": 1,
    "optim/rowwise_adam.py": 1,
    "optim/sinkhorn.py": 1,
    "models/hyper.py": 2,
}
"""Imports of kernels where rows or modules carry the answer that they were given when they were made, or their caller
asks."""


def test_every_place_asks() -> None:
    """Whoever imports kernels on the way asks :func:`use_kernels` in the same function; ``is_cuda`` decides other
    things."""
    for path in SOURCE.rglob("*.py"):
        text, name = path.read_text(), path.relative_to(SOURCE).as_posix()
        if name.endswith(("_kernels.py", "_fused.py")) or name in ("fusion/fused.py", "fusion/engram.py"):
            continue
        unasked = 0
        for function in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
            imports = [node.module or "" for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
            asks = "use_kernels(" in (ast.get_source_segment(text, function) or "")
            unasked += not asks and sum(module.endswith(("_kernels", "_fused")) for module in imports)
        assert unasked == FOLLOW.get(name, 0), name
        lines = [line for line in text.splitlines() if re.search(r"\bif .*\.is_cuda", line)]
        allowed = {
            "readout.py": 1,
            "loss.py": 1,
            "attention.py": 1,
            "source.py": 1,
            "cached.py": 1,
            "table.py": 1,
            "prefetching.py": 1,
        }
        allowed["codecs.py"] = allowed["lanes.py"] = 2
        assert len(lines) <= allowed.get(path.name, 0), (path, lines)
