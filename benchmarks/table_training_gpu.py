"""table-training: time and memory of a training step over 1 M, 10 M and 100 M rows, for ways to train a table.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python benchmarks/table_training_gpu.py --peft WHEEL
    python benchmarks/table_training_gpu.py --figure

A decoder of 4 blocks, hidden 512, with an Engram at block 1 (orders 2 and 3, 8 heads, rows of 64 fp32 numbers, bf16
embeddings) trains on 65,536 tokens of natural text a step, in bf16 autocast, its blocks recomputed so that activations
leave the card to the tables. Decoder, fusion, text, row ids and the network's Adam are the same for all; what differs
is where rows come from, how their gradient gets back, and their optimiser:

- ours-adam, ours-rowwise: a memory bank in HBM, with RowAdam or RowwiseAdam; ours-adam-host: RowAdam, in host memory.
- dense-adam: `nn.Embedding` and Adam, whose fused kernel passes over the whole table.
- sparse-adam: `nn.Embedding(sparse=True)` and SparseAdam, which has neither a fused form nor a foreach one.
- peft-sparse, peft-dense: engram-peft 1.2.7's MultiHeadEmbedding and the optimiser of its get_optimizer(), as by
  default (sparse, SparseAdam) and with `use_sparse_embeddings=False` (Adam). WHEEL is the unpacked wheel; only its
  files layer.py and utils/general.py are loaded. Its own hashing, on the CPU in its data loader, is left out.

Ours hash in the step; all others are given row ids that were made beforehand. By the end of a turn ours have written
every row. Before anything is timed a way's row gradients must be the embeddings' gradient, added up plainly.

Ways take turns as far as they fit the card together. `network` is the step with constant embeddings; it is in every
such group, and what a way's time is compared with. `resident` is what a way holds between steps, and `peak` the most
within a step: activations and the network's gradients, which `network-peak` has alone, are in it, the network's
parameters are not. What runs out of memory has `inf` in its rows and says so in their unit. `--figure` draws
docs/figures/table-training.svg from the CSV.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from record import record
from table_figure import draw
from table_text import Text, read_text
from table_ways import LAYER, NAME, Constant, Kind, Setting, Way, kinds

from torch_engram.bench.timing import median
from torch_engram.config import EngramConfig
from torch_engram.models import Decoder, DecoderConfig
from torch_engram.train.loss import head_loss

CLAIM, GIB = "table-training", 2**30
NETWORK, OURS = "network", "ours-adam"
WARM_UP, TOLERANCE = 3, 2e-2
ROOM = 0.8
"""Share of the card that ways which take turns may hold by their rows: the rest is for steps."""
BESIDE = 2 * GIB
"""What a way holds besides its rows, about."""

Note = Callable[..., None]


def engram_at(rows: int, hidden: int, row_dim: int, vocab_size: int) -> EngramConfig:
    """The memory with so many rows in all."""
    return EngramConfig(
        layers=(LAYER,), hidden=hidden, vocab_size=vocab_size, heads=8, row_dim=row_dim, rows_per_head=rows // 16
    )


class Network:
    """The decoder and its optimiser: one for all ways, which take turns with it."""

    def __init__(self, text: Text, engram: EngramConfig, layers: int, device: torch.device):
        torch.manual_seed(0)
        size = -(-text.tokens_in_vocab // 64) * 64
        shape = DecoderConfig(
            vocab_size=size, hidden=engram.hidden, layers=layers, heads=8, ffn_hidden=11 * engram.hidden // 4,
            real_vocab=text.tokens_in_vocab if size > text.tokens_in_vocab else None, engrams={NAME: engram},
        )  # fmt: skip
        self.decoder = Decoder(shape, recompute=True).to(device)
        self.optimizer = torch.optim.Adam(self.decoder.parameters(), 1e-4, fused=True)
        self._mixed = device.type == "cuda"
        for parameter in self.decoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # changes nothing; its state is there before any way is, and counts to none
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, way: Way, setting: Setting, number: int) -> None:
        """Forward and backward of step ``number``."""
        batch, memory = setting.batch(number), way.begin(number)
        divisor = torch.full((), float(batch.targets.numel()), device=setting.device)
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=self._mixed):
            hidden = self.decoder(batch.tokens, memory, return_hidden=True)
            loss = head_loss(hidden, self.decoder.head.weight, batch.targets, self.decoder.pad_bias, divisor)
        loss.backward()

    def step(self, way: Way, setting: Setting, number: int) -> None:
        """A whole training step."""
        self.backward(way, setting, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        way.update()


@dataclass
class Taken:
    """What a way took: milliseconds of a step and GiB, one sample a turn. Memory is not counted on a CPU."""

    milliseconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    resident: float | None = None
    """GiB between steps."""


class Entrant:
    """A way that takes turns: built, its gradients checked, past its first steps. Raises what :func:`out_of_memory`
    knows."""

    def __init__(self, build: Callable[[Setting], Way], network: Network, setting: Setting):
        self._on_gpu = setting.device.type == "cuda"
        self._network, self._setting, self._done = network, setting, 0
        before = torch.cuda.memory_allocated() if self._on_gpu else 0
        self._way, self.taken = build(setting), Taken()
        check(self._way, network, setting)
        self._run(WARM_UP)
        if self._on_gpu:
            self.taken.resident = (torch.cuda.memory_allocated() - before) / GIB

    def _settle(self) -> None:
        self._way.settle()
        if self._on_gpu:
            torch.cuda.synchronize()

    def _run(self, steps: int) -> float:
        """Milliseconds of a step, the mean of so many."""
        self._settle()
        start = time.perf_counter()
        for _ in range(steps):
            self._network.step(self._way, self._setting, self._done)
            self._done += 1
        self._settle()
        return 1e3 * (time.perf_counter() - start) / steps

    def turn(self, steps: int) -> None:
        """Measure so many steps."""
        if self.taken.resident is None:
            self.taken.milliseconds.append(self._run(steps))
            return
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.taken.milliseconds.append(self._run(steps))
        self.taken.peaks.append((torch.cuda.max_memory_allocated() - held) / GIB + self.taken.resident)


def check(way: Way, network: Network, setting: Setting) -> None:
    """The way's row gradients at the start, against those of the embeddings' gradient added up plainly."""
    rows, found = setting.batch(0).rows.unique(), []
    for one in (way, Constant(setting)):
        network.backward(one, setting, 0)
        found.append(one.gradients(rows))
        network.optimizer.zero_grad(set_to_none=True)
    error = float((found[0] - found[1]).norm() / found[1].norm())
    assert error < TOLERANCE, f"{type(way).__name__}: the rows' gradient is off by {error:.3g}, so nothing is timed"


def out_of_memory(error: BaseException) -> bool:
    """Whether it is that, or was caused by it."""
    return any(isinstance(one, torch.OutOfMemoryError | MemoryError) for one in (error, error.__cause__))


def attempt(act: Callable[[], object]) -> bool:
    """Do it; False where memory does not suffice."""
    try:
        act()
    except (torch.OutOfMemoryError, MemoryError, ValueError) as error:
        if not out_of_memory(error):
            raise
        print(f"out of memory: {str(error).splitlines()[0]}", flush=True)
        return False
    return True


def clear(network: Network) -> None:
    """Give back what a way that is gone or failed has held."""
    network.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def together(ways: Mapping[str, Kind], setting: Setting) -> Iterator[list[str]]:
    """Names of ways that fit the card at once, in their order."""
    room = math.inf
    if setting.device.type == "cuda":
        room = ROOM * torch.cuda.get_device_properties(setting.device).total_memory
    group, held = [], 0.0
    for name, kind in ways.items():
        takes = BESIDE + setting.layout.rows * kind.row_bytes(setting.config.per_order("row_dim")[0])
        if group and held + takes > room:
            yield group
            group, held = [], 0.0
        group.append(name)
        held += takes
    yield group


def time_group(
    group: list[str], ways: Mapping[str, Kind], network: Network, setting: Setting, turns: int, steps: int
) -> dict[str, Taken]:
    """What a group's ways took, and the network alone; without those that found no memory. Nothing at all where the
    network itself found none beside the tables."""
    entrants = {NETWORK: Entrant(Constant, network, setting)}
    for name in group:
        if not attempt(lambda name=name: entrants.update({name: Entrant(ways[name].build, network, setting)})):
            clear(network)
    for number in range(turns):
        for name in list(entrants)[:: -1 if number % 2 else 1]:
            if not attempt(partial(entrants[name].turn, steps)):
                del entrants[name]
                clear(network)
    return {name: entrant.taken for name, entrant in entrants.items()} if NETWORK in entrants else {}


def measure(
    ways: Mapping[str, Kind], network: Network, setting: Setting, asked: argparse.Namespace, note: Note
) -> None:
    """All ways at one number of rows; each is told of as soon as it is known."""
    distinct = [float(len(batch.rows.unique())) for batch in setting.batches]
    note(f"distinct-{setting.label}", distinct, "rows", reference=float(setting.batch(0).rows.numel()))
    queue, ours, alone = list(together(ways, setting)), None, None
    for group in queue:
        taken = time_group(group, ways, network, setting, asked.turns, asked.steps)
        clear(network)
        if alone is None and NETWORK in taken:
            report(NETWORK, setting.label, taken[NETWORK], taken[NETWORK], note)
        alone, ours = taken.get(NETWORK, alone), taken.get(OURS, ours)
        for name in group:
            if name not in taken and len(group) > 1:
                queue.append([name])  # perhaps the others took its room
                continue
            if name in taken:
                report(name, setting.label, taken[name], taken[NETWORK], note)
            else:
                report_none(name, setting.label, note)
            if ours is not None and name != OURS:
                compare(name, setting.label, taken.get(name), ours, note)


def report(name: str, label: str, taken: Taken, alone: Taken, note: Note) -> None:
    """Time and memory of one way; ``alone``: what the network took in the same group."""
    reference = median(alone.milliseconds)
    ratio = median(taken.milliseconds) / reference
    note(f"{name}-{label}-step", taken.milliseconds, "ms", reference=reference, ratio=ratio)
    if taken.resident is not None:
        note(f"{name}-{label}-resident", [taken.resident], "GiB")
        note(f"{name}-{label}-peak", taken.peaks, "GiB")


def report_none(name: str, label: str, note: Note) -> None:
    """That a way did not fit."""
    for case, unit in (("step", "ms"), ("resident", "GiB"), ("peak", "GiB")):
        note(f"{name}-{label}-{case}", [math.inf], f"{unit} (out of memory)")


def compare(name: str, label: str, taken: Taken | None, ours: Taken, note: Note) -> None:
    """A way's time over that of ours with RowAdam in HBM, turn by turn."""
    if taken is None:
        note(f"{name}-over-ours-{label}", [math.inf], "times (out of memory)", reference=1.0)
        return
    ratios = [a / b for a, b in zip(taken.milliseconds, ours.milliseconds, strict=True)]
    note(f"{name}-over-ours-{label}", ratios, "times", reference=1.0)


def settings(text: Text, asked: argparse.Namespace, device: torch.device) -> Iterator[Setting]:
    """One setting a number of rows, with the same text."""
    for rows in asked.rows:
        config = engram_at(rows, asked.hidden, asked.row_dim, text.vocab.size)
        layout, batches = text.batches(config, LAYER, device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        yield Setting(f"{rows / 1e6:g}M", config, text.vocab, layout, batches, device, dtype)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", type=Path, help="folder of the unpacked engram-peft wheel")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of a turn")
    parser.add_argument("--tiny", action="store_true", help="a toy on any device; nothing is recorded")
    parser.add_argument("--figure", action="store_true", help="only draw the figure from the CSV")
    asked = parser.parse_args(arguments)
    if asked.figure:
        draw()
        return
    asked.hidden, asked.row_dim, layers, shape = (512, 64, 4, (64, 1024)) if not asked.tiny else (64, 8, 2, (2, 32))
    device = torch.device("cpu" if asked.tiny and not torch.cuda.is_available() else "cuda")
    text = read_text(*shape, batches=12 if not asked.tiny else 3, every=4 if not asked.tiny else 100)
    note: Note = partial(record, CLAIM, device=device.type) if not asked.tiny else tell
    ways, network = kinds(asked.peft), None
    for setting in settings(text, asked, device):
        network = Network(text, setting.config, layers, device) if network is None else network
        measure(ways, network, setting, asked, note)


def tell(case: str, samples: list[float], unit: str, **_: float) -> None:
    """Instead of recording it."""
    print(f"{case}: {median(samples):.6g} {unit}")


if __name__ == "__main__":
    main()
