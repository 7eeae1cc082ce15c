"""A memory at fixed addresses: the same training, with tensors that never move, captured in a CUDA graph too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_engram.memory import FixedMemory, Memory, MemoryBank, Tokens
from torch_engram.optim import RowAdam

Make = Callable[..., MemoryBank]
Records = Callable[[MemoryBank], list[Tensor]]
BATCH, LENGTH, MICRO, STEPS = 2, 7, 2, 6
CONFIGS = [{}, dict(row_dim=(3, 5), heads=(2, 3))]  # one table a layer, and two that share its embeddings


class Network(nn.Module):
    """Reads layer 1 first and layer 3 after some work, as a decoder does."""

    def __init__(self, width: int):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, memory: Memory) -> Tensor:
        hidden = self.first(memory.wait(1)["engram"]).tanh()
        return self.second(hidden * memory.wait(3)["engram"]).square().sum()


def batches(dead: bool) -> list[list[Tokens]]:
    generator = torch.Generator().manual_seed(2)
    shape = (BATCH, LENGTH)

    def tokens() -> Tokens:
        ids = torch.randint(9, shape, generator=generator)
        return Tokens(ids, live=torch.rand(shape, generator=generator) < 0.7 if dead else None)

    return [[tokens() for _ in range(MICRO)] for _ in range(STEPS)]


def train_ordinarily(bank: MemoryBank, network: nn.Module, data: list[list[Tokens]]) -> list[float]:
    losses = []
    for micro_batches in data:
        step = bank.prefetch(*micro_batches)
        for micro in range(MICRO):
            loss = network(step[micro])
            loss.backward()
            losses.append(loss.item())
        step.reduce()
        step.apply()
    return losses


def train_fixed(
    bank: MemoryBank, fixed: FixedMemory, replay: Callable[[], Tensor], data: list[list[Tokens]]
) -> list[float]:
    losses = []
    for micro_batches in data:
        step = bank.prefetch(*micro_batches)
        for micro in range(MICRO):
            fixed.load(step, micro)
            losses.append(replay().clone())
            fixed.merge()
        step.reduce()
        step.apply()
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_as_an_ordinary_memory_does(
    make_bank: Make, every_record: Records, config: dict[str, Any], dead: bool, dtype: torch.dtype
) -> None:
    banks = [make_bank(config, optimizer=lambda p: RowAdam(p, lr=0.05), dtype=dtype) for _ in range(2)]
    networks = [Network(banks[0].config.embedding_dim).to(dtype) for _ in range(2)]
    fixed = FixedMemory(banks[1], BATCH, LENGTH)
    before = [fixed.wait(layer)["engram"] for layer in (1, 3)]
    places = [(leaf.data_ptr(), leaf.grad.data_ptr()) for leaf in before if leaf.grad is not None]

    def replay() -> Tensor:
        loss = networks[1](fixed)
        loss.backward()
        return loss.detach()

    assert train_fixed(banks[1], fixed, replay, batches(dead)) == train_ordinarily(banks[0], networks[0], batches(dead))
    mine, theirs = every_record(banks[1]), every_record(banks[0])
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    after = [fixed.wait(layer)["engram"] for layer in (1, 3)]
    assert all(a is b for a, b in zip(before, after, strict=True)) and fixed.wait(0) == {}
    assert [(leaf.data_ptr(), leaf.grad.data_ptr()) for leaf in after if leaf.grad is not None] == places != []


def test_what_is_out_of_order_is_refused(make_bank: Make) -> None:
    bank, reader = make_bank(optimizer=RowAdam), make_bank()
    fixed, fixed_reader = FixedMemory(bank, 2, 7), FixedMemory(reader, 2, 7)
    with pytest.raises(ValueError, match=r"no gradients to merge: load\(\) a step"):
        fixed.merge()
    with pytest.raises(ValueError, match=r"embeddings of layer 1 are \[1, 7, \d+\], not \[2, 7, \d+\]"):
        fixed.load(bank.prefetch(torch.zeros(1, 7, dtype=torch.int64)))
    step = bank.prefetch(torch.zeros(2, 7, dtype=torch.int64))
    fixed.load(step)
    with pytest.raises(ValueError, match=r"not merged yet: call merge\(\) after each replay"):
        fixed.load(step)
    fixed.merge()
    for micro in (1, -1):
        with pytest.raises(IndexError, match="has 1 micro-batches, no number"):
            fixed.load(step, micro)
    with pytest.raises(ValueError, match="another bank's: load those that memory 'engram' prefetched"):
        fixed.load(make_bank(optimizer=RowAdam).prefetch(torch.zeros(2, 7, dtype=torch.int64)))
    fixed.load(step)
    step.discard()
    with pytest.raises(ValueError, match="applied or discarded"):
        fixed.load(step)
    fixed.load(bank.prefetch(torch.zeros(2, 7, dtype=torch.int64)))  # a step that was given up needs no merge
    for ids in torch.zeros(3, 2, 7, dtype=torch.int64):  # a reader has nothing to merge
        fixed_reader.load(reader.prefetch(ids))
        assert not fixed_reader.wait(1)["engram"].requires_grad
    with pytest.raises(ValueError, match="a bank with an optimizer"):
        fixed_reader.merge()


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_captured_network_trains_as_one_that_is_called(
    make_bank: Make, every_record: Records, config: dict[str, Any], placement: str
) -> None:
    banks = [
        make_bank(config, optimizer=lambda p: RowAdam(p, lr=0.05), device="cuda", placement=placement) for _ in range(2)
    ]
    networks = [Network(banks[0].config.embedding_dim).cuda() for _ in range(2)]
    expected = train_ordinarily(banks[0], networks[0], batches(dead=True))
    fixed = FixedMemory(banks[1], BATCH, LENGTH)
    graph, loss = captured(fixed, networks[1])

    def replay() -> Tensor:
        graph.replay()
        return loss

    assert train_fixed(banks[1], fixed, replay, batches(dead=True)) == expected
    mine, theirs = every_record(banks[1]), every_record(banks[0])
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["device", "host"])
def test_nothing_is_overwritten_when_the_host_runs_ahead(
    make_bank: Make, every_record: Records, placement: str
) -> None:
    """Steps prefetched ahead, no masks, nothing read back: the host never waits, and memory is used again at once."""
    data = [torch.randint(60, (BATCH, 300), device="cuda") for _ in range(40)]
    records = []
    for fixes in (False, True):
        bank = make_bank(optimizer=lambda p: RowAdam(p, lr=0.05), device="cuda", placement=placement)
        network = Network(bank.config.embedding_dim).cuda()
        memory = FixedMemory(bank, BATCH, 300)
        graph, _ = captured(memory, network)
        ahead = bank.prefetch(data[0])
        for following in [*data[1:], data[0]]:
            step, ahead = ahead, bank.prefetch(following)
            if fixes:
                memory.load(step)
                graph.replay()
                memory.merge()
            else:
                network(step[0]).backward()
                torch.cuda.synchronize()
            step.reduce()
            step.apply()
        ahead.discard()
        records.append(every_record(bank))
    assert all(torch.equal(a, b) for a, b in zip(*records, strict=True))


@pytest.mark.gpu
def test_a_replay_waits_for_rows_that_are_late(make_bank: Make) -> None:
    bank = make_bank(dict(init_std=0.1), device="cuda")
    network = Network(bank.config.embedding_dim).cuda().requires_grad_(False)
    fixed = FixedMemory(bank, BATCH, LENGTH)
    graph, loss = captured(fixed, network)
    found, expected = [], []
    for tokens, _ in batches(dead=False):
        expected.append(network(bank.read(tokens)).item())
        step = bank.prefetch(tokens)
        assert fixed._stream is not None
        with torch.cuda.stream(fixed._stream):
            torch.cuda._sleep(50_000_000)  # some tens of milliseconds, in which a replay that does not wait is over
        fixed.load(step)
        graph.replay()
        found.append(loss.item())
    assert found == expected and len(set(found)) == STEPS


def captured(fixed: FixedMemory, network: Network) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Forward, and backward where there is something to learn, after the warm-up that a capture needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    trains = fixed.wait(1)["engram"].requires_grad

    def once() -> Tensor:
        loss = network(fixed)
        if trains:
            loss.backward()
        return loss.detach()

    with torch.cuda.stream(stream):
        for _ in range(2):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = once()
    return graph, loss
