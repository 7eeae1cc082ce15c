"""Decoding at fixed addresses: what :class:`DecodeMemory` gives is what the bank reads of the whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.memory import DecodeMemory, MemoryBank, Tokens
from torch_engram.memory.decode_kernels import push_triton
from torch_engram.memory.decoding import push_naive
from torch_engram.stores import NgramCache, host_reads
from torch_engram.stores.synthetic import synthesise

KERNELS = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEQUENCES, PROMPT, STEPS = 5, 4, 6
Make = Callable[..., MemoryBank]
FILES = {"row_dim": 32}


@pytest.fixture(scope="module")
def tables(make_bank: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, str]]:
    """A table of random FP8 rows for every layer of the small configuration."""
    found = {}
    for table in make_bank(FILES).tables:
        folder = tmp_path_factory.mktemp("tables") / "table"
        synthesise(folder, "plain", table.rows, table.dim, "fp8", layer=table.layer, seed=table.layer)
        found[table.layer] = (folder / "table-00000.safetensors", "table.weight")
    return found


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, document starts and live positions of all sequences, prompts and what follows them."""
    ids = torch.randint(60, (SEQUENCES, PROMPT + STEPS))
    starts, live = torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    starts[1, PROMPT - 1] = starts[2, PROMPT - 2] = True
    live[3, : PROMPT - 1] = live[4, :PROMPT] = False
    return ids, starts, live


def expected(bank: MemoryBank, ids: Tensor, starts: Tensor, live: Tensor) -> list[Tensor]:
    """What the bank reads of whole sequences."""
    memory = bank.read(Tokens(ids, doc_start=starts, live=live))
    return [memory.wait(layer)[bank.name][:, PROMPT:] for layer in bank.config.layers]


def decoded(bank: MemoryBank, memory: DecodeMemory, ids: Tensor, starts: Tensor, live: Tensor) -> list[Tensor]:
    """The same, one token at a time after the prompts."""
    history = bank.new_history()
    prompt = slice(0, PROMPT)
    bank.read(Tokens(ids[:, prompt], doc_start=starts[:, prompt], live=live[:, prompt], history=history))
    memory.begin(history)
    found: list[list[Tensor]] = [[] for _ in bank.config.layers]
    for step in range(PROMPT, ids.shape[1]):
        memory.read(ids[:, step : step + 1].to(bank.device))
        for parts, layer in zip(found, bank.config.layers, strict=True):
            parts.append(memory.wait(layer)[bank.name].clone())
    return [torch.cat(parts, 1) for parts in found]


WAYS = [
    dict(placement="device"), dict(placement="host"), dict(placement="host", cache=30_000),
    dict(placement="host", cache="1MB"), dict(placement="disk", cache="1MB"),
    dict(placement="disk-direct", cache=30_000),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_a_token_at_a_time_reads_what_whole_sequences_read(
    make_bank: Make, tables: dict[int, tuple[Path, str]], device: torch.device, way: dict[str, str]
) -> None:
    bank = make_bank(FILES, tables=tables, device=device, **way)
    memory = DecodeMemory(bank, SEQUENCES)
    others = [torch.full((size,), 1 << 50, device=device) for size in range(1, 400)]  # where something was let go
    places = [memory.wait(layer)[bank.name].data_ptr() for layer in bank.config.layers]
    for _ in range(3):
        sequences = texts()
        for got, want in zip(decoded(bank, memory, *sequences), expected(bank, *sequences), strict=True):
            assert torch.equal(got, want)
    assert places == [memory.wait(layer)[bank.name].data_ptr() for layer in bank.config.layers]
    assert memory.wait(2) == {} and len(others) == 399


@pytest.mark.gpu
@pytest.mark.parametrize("first, share", [(0, 0), (0, 96), (10**9, 0)])
def test_the_host_and_the_gpu_bring_the_same(
    make_bank: Make, tables: dict[int, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch, first: int, share: int
) -> None:
    monkeypatch.setattr(host_reads, "divide", lambda *_: (first, share))
    bank = make_bank(FILES, tables=tables, device="cuda", placement="host", cache=30_000)
    memory = DecodeMemory(bank, SEQUENCES)
    before = bank.cache_counts()
    for _ in range(3):
        sequences = texts()
        for got, want in zip(decoded(bank, memory, *sequences), expected(bank, *sequences), strict=True):
            assert torch.equal(got, want)
    misses = [bank.cache_counts()[place]["misses"] - before[place]["misses"] for place in before]
    assert all(misses) and isinstance(bank.source(bank.tables[0]).store, NgramCache)


@pytest.mark.gpu
def test_a_model_that_is_captured_reads_each_steps_memory(make_bank: Make, tables: dict[int, tuple[Path, str]]) -> None:
    bank = make_bank(FILES, tables=tables, device="cuda", placement="host", cache=30_000)
    memory, sequences = DecodeMemory(bank, SEQUENCES), texts()
    want = expected(bank, *sequences)
    following = sequences[0].cuda()
    history = bank.new_history()
    prompts = [part[:, :PROMPT] for part in sequences]
    bank.read(Tokens(prompts[0], doc_start=prompts[1], live=prompts[2], history=history))
    memory.begin(history)
    step = torch.full((1,), PROMPT, device="cuda")
    out = torch.zeros(len(want), SEQUENCES, STEPS, bank.config.embedding_dim, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for number, layer in enumerate(bank.config.layers):
            out[number].index_copy_(1, step - PROMPT, memory.wait(layer)[bank.name])
        step.add_(1)
        memory.ids.copy_(following.index_select(1, step.clamp(max=following.shape[1] - 1)))
    memory.ids.copy_(following[:, PROMPT : PROMPT + 1])
    for _ in range(STEPS):
        ready = torch.cuda.current_stream().record_event()
        memory.read(memory.ids, after=ready)
        graph.replay()
    for got, wanted in zip(out, want, strict=True):
        assert torch.equal(got, wanted)


def test_what_does_not_fit_is_named(make_bank: Make, tables: dict[int, tuple[Path, str]], device: torch.device) -> None:
    bank = make_bank(FILES, tables=tables, device=device, placement="host", cache="1MB")
    memory = DecodeMemory(bank, SEQUENCES)
    history = bank.new_history()
    bank.read(Tokens(torch.ones(2, 3, dtype=torch.int64), history=history))
    with pytest.raises(ValueError, match="decodes 5 sequences, and the history has 2"):
        memory.begin(history)
    with pytest.raises(ValueError, match=r"Ids are \[5\]: this memory decodes \[5, 1\]"):
        memory.read(torch.ones(5, dtype=torch.int64, device=device))
    memory.begin(bank.new_history())
    strange = torch.full((SEQUENCES, 1), 60, device=device)
    with pytest.raises(ValueError, match="Token id 60 is outside this memory's vocabulary of 60 ids"):
        memory.read(strange)
        torch.cuda.synchronize() if device.type == "cuda" else None
        memory.read(strange)
        memory.wait(1)
    memory.begin(bank.new_history())
    memory.read(strange - 1)
    if device.type == "cuda":
        torch.cuda.synchronize()


@settings(max_examples=20)
@given(st.integers(1, 70), st.integers(2, 5), st.integers(0, 99))
def test_the_last_tokens_move_on_by_one(sequences: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(99, (sequences, length), generator=generator)
    flags = [torch.rand(sequences, length, generator=generator) < 0.5 for _ in range(2)]
    ids = torch.randint(99, (sequences, 1), generator=generator)
    naive, kernel = ([part.clone() for part in (tokens, *flags)] for _ in range(2))
    push_naive(ids, naive[0], naive[1], naive[2])
    kernel = [part.to(KERNELS) for part in kernel]
    push_triton(ids.to(KERNELS), kernel[0], kernel[1], kernel[2])
    for one, other in zip(naive, kernel, strict=True):
        assert torch.equal(one, other.cpu())
    assert torch.equal(naive[0], torch.cat((tokens[:, 1:], ids), 1))
