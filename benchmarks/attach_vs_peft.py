"""vs-engram-peft: training a memory on SmolLM2-135M, against engram-peft 1.2.7: speed, memory, and what is learned.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python benchmarks/attach_vs_peft.py WHEEL [--model FOLDER]
    ... --part losses

WHEEL is the unpacked wheel, imported as a whole with stand-ins for what is missing (attached/peft_package.py): on
Python 3.11 it fails at its import as it is. The backbone is frozen, in fp32 under bf16 autocast; the memory at blocks 1
and 2 is trained alone: orders 2 and 3, 8 heads, rows of 32 fp32 numbers, one branch, with convolution, 16,384 tokens of
natural text a step. One loop trains all: loss, backward, step, zero_grad. Before anything is timed, equal weights must
give equal losses and equal gradients of the same rows in both, and both must leave the model's loss alone at their own
start. That is of the same row ids: each hashes by its own code, and engram-peft's 2-grams end a token early
(attached/fairness.py).

- ours, ours-rowwise: `attach()` and `memory.optimizer()`, with RowAdam, the default, or RowwiseAdam.
- peft-sparse: `get_engram_model()` and `create_optimizer()` as by default: SparseAdam. Its batches bring the hashes of
  its data collator, as if by worker processes that cost nothing, already on the GPU.
- peft-bf16: the same with `engram_dtype="bfloat16"`. peft-dense: with `use_sparse_embeddings=False` and Adam.
- free: no memory, but the backward that one takes, for a vector: nothing that trains at these blocks can be faster.
- peft-unhooked: peft-sparse without the hook by which it hashes every batch on the CPU again, though the hashes are
  there. It has no setting for that, so this is no setting of its own, and does not count as its fastest.

All are timed as they are, and with every block of the model compiled, which is left to the user in both. Ways take
turns; each is built anew for its turn, so that it has the card to itself. Memory is the most that was allocated, the
model and activations included. What runs out of memory has 0 tokens/s and says so in its unit.

The part `losses` trains from scratch on one pass of text and tells the loss on held-out text: each at its own default
rates (`default`), and with modules at 1e-3 and each of some rates for rows, the same for both, of which `best` is best.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attached.backbone import backbone
from attached.fairness import require_same
from attached.peft_package import load
from attached.text import tokens_of_corpus
from attached.training import Free, Ours, Peft, Setting, Way
from record import record
from table_training_gpu import out_of_memory
from torch import Tensor

from torch_engram.bench.timing import median
from torch_engram.optim import RowwiseAdam

GIB = 2**30
OURS, ROWWISE, FREE, UNHOOKED = "ours", "ours-rowwise", "free", "peft-unhooked"
LAYERS, MODULE_RATE, RATES, HELD_OUT = (1, 2), 1e-3, (1e-3, 3e-3, 1e-2, 3e-2), 8
"""``HELD_OUT``: batches."""
COMPARED = ROWWISE, FREE, UNHOOKED
"""Ways that are also told against others: with other rows' state, with no memory, and without their second hashing."""

Build = Callable[..., Way]
Note = Callable[..., None]


def ways(package: Any) -> dict[str, Build]:
    """How each is built on a setting."""
    peft = partial(Peft, package)
    return {
        OURS: Ours,
        ROWWISE: partial(Ours, kind=RowwiseAdam),
        "peft-sparse": peft,
        "peft-bf16": partial(peft, dtype="bfloat16"),
        "peft-dense": partial(peft, sparse=False),
        UNHOOKED: partial(peft, hashes=False),
        FREE: Free,
    }


class Blocks:
    """A model's blocks, as they are or compiled."""

    def __init__(self, model: Any, backend: str):
        self._layers = list(model.model.layers)
        self._compiled = [torch.compile(layer.forward, backend=backend) for layer in self._layers]

    @contextmanager
    def compiled(self, wanted: bool) -> Iterator[None]:
        """Within, compiled where that is ``wanted``."""
        for layer, forward in zip(self._layers, self._compiled, strict=True):
            if wanted:
                layer.forward = forward
        try:
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)


def step(way: Way, number: int, device: torch.device) -> None:
    """A whole training step."""
    with torch.autocast(device.type, torch.bfloat16):
        loss = way.loss(number)
    loss.backward()
    way.optimizer.step()
    way.optimizer.zero_grad(set_to_none=True)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def on_the_model(build: Build, setting: Setting, **rates: float | None) -> Iterator[Way]:
    """A way, built on a card that holds nothing of those before it, and afterwards removed."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    way = build(setting, **rates)
    try:
        way.train(True)
        yield way
    finally:
        way.remove()


def turn(build: Build, setting: Setting, steps: int, warm_up: int) -> tuple[float, float]:
    """Tokens a second, and GiB at most; raises where memory does not suffice."""
    on_gpu = setting.device.type == "cuda"
    with on_the_model(build, setting) as way:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for number in range(warm_up):
            step(way, number, setting.device)
        wait(setting.device)
        start = time.perf_counter()
        for number in range(warm_up, warm_up + steps):
            step(way, number, setting.device)
        wait(setting.device)
        seconds = time.perf_counter() - start
        return steps * setting.batches[0].numel() / seconds, torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0


def take(build: Build, setting: Setting, asked: argparse.Namespace) -> tuple[float, float] | None:
    """As :func:`turn`; None where memory does not suffice."""
    try:
        return turn(build, setting, asked.steps, asked.warm_up)
    except (torch.OutOfMemoryError, MemoryError, ValueError) as error:
        if not out_of_memory(error):
            raise
        print(f"out of memory: {str(error).splitlines()[0]}", flush=True)
    return None


def speeds(
    builds: Mapping[str, Build], setting: Setting, label: str, asked: argparse.Namespace, blocks: Blocks, note: Note
) -> None:
    """All ways in turns at one number of rows, and what is recorded of them."""
    taken: dict[str, list[tuple[float, float] | None]] = {}
    for number in range(asked.turns):
        for name in list(builds)[:: -1 if number % 2 else 1]:
            for mode in ("plain", "compiled"):
                found = taken.setdefault(f"{name}-{mode}", [])
                if None not in found:
                    with blocks.compiled(mode == "compiled"):
                        found.append(take(builds[name], setting, asked))
    for found in taken.values():  # what ran out of memory once was not asked again
        found += [None] * (asked.turns - len(found))
    rates = {name: [0.0 if one is None else one[0] for one in found] for name, found in taken.items()}
    asked_of = {OURS: _named(OURS), "peft": _counts, **{name: _named(name) for name in COMPARED}}
    fastest = {
        whose: max((name for name in rates if is_of(name)), key=lambda name: median(rates[name]))
        for whose, is_of in asked_of.items()
    }
    own = rates[fastest[OURS]]
    for name, found in taken.items():
        missing = " (out of memory)" if None in found else ""
        case, reference = f"{name}-{label}", median(own)
        note(f"{case}-speed", rates[name], f"tokens/s{missing}", reference=reference,
             ratio=median(rates[name]) / reference)  # fmt: skip
        note(f"{case}-peak", [math.inf if one is None else one[1] for one in found], f"GiB{missing}")
    for whose, over in ((OURS, "peft"), (OURS, UNHOOKED), (ROWWISE, "peft"), (FREE, "peft")):
        pairs = zip(rates[fastest[whose]], rates[fastest[over]], strict=True)
        print(f"fastest of {whose}: {fastest[whose]}, of {over}: {fastest[over]}", flush=True)
        case = f"{whose}-over-{over.removeprefix('peft-')}-{label}"
        note(case, [a / b if b else math.inf for a, b in pairs], "times", reference=1.0)


def _named(way: str) -> Callable[[str], bool]:
    """In either mode."""
    return lambda name: name in (f"{way}-plain", f"{way}-compiled")


def _counts(name: str) -> bool:
    """A setting of engram-peft's own."""
    return name.startswith("peft-") and not name.startswith(UNHOOKED)


def learned(build: Build, setting: Setting, held_out: Tensor, **rates: float | None) -> float:
    """The loss on held-out text after one pass of the setting's."""
    both = replace(setting, batches=torch.cat((setting.batches, held_out)))
    with on_the_model(build, both, **rates) as way:
        for number in range(len(setting.batches)):
            step(way, number, setting.device)
        way.train(False)
        with torch.no_grad(), torch.autocast(setting.device.type, torch.bfloat16):
            losses = [way.loss(len(setting.batches) + number) for number in range(len(held_out))]
        return float(torch.stack(losses).mean())


def losses(builds: Mapping[str, Build], setting: Setting, held_out: Tensor, label: str, note: Note) -> None:
    """What some ways have learned, at their default rates and at those of the grid."""
    for name in (OURS, ROWWISE, "peft-sparse"):
        note(f"{name}-{label}-loss-default", [learned(builds[name], setting, held_out)], "nats a token")
        by_rate = {rate: learned(builds[name], setting, held_out, lr=MODULE_RATE, row_lr=rate) for rate in RATES}
        for rate, loss in by_rate.items():
            note(f"{name}-{label}-loss-{rate:g}", [loss], "nats a token")
        note(f"{name}-{label}-loss-best", [min(by_rate.values())], "nats a token")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="folder of the unpacked engram-peft wheel")
    parser.add_argument("--model", help="a folder with SmolLM2-135M and its tokenizer")
    parser.add_argument("--part", choices=("speeds", "losses"), default="speeds")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--sequences", type=int, default=32, help="of 512 tokens, in a step")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them")
    parser.add_argument("--learned", type=int, default=60, help="steps of the part losses")
    parser.add_argument("--tiny", action="store_true", help="a toy on any device; nothing is recorded")
    asked = parser.parse_args(arguments)
    device = torch.device("cpu" if asked.tiny and not torch.cuda.is_available() else "cuda")
    package, base = load(asked.peft), backbone(asked.model, device, torch.float32, asked.tiny)
    base.model.config.use_cache = False
    sequences, length, row_dim = (asked.sequences, 512, 32) if not asked.tiny else (4, 64, 8)
    number = asked.learned + HELD_OUT if asked.part == "losses" else asked.steps + asked.warm_up
    text = tokens_of_corpus(base.tokenizer, number * sequences * length).view(number, sequences, length).to(device)
    note: Note = tell if asked.tiny else partial(record, "vs-engram-peft", device=device.type)
    builds, blocks = ways(package), Blocks(base.model, "inductor" if not asked.tiny else "aot_eager")
    with torch.backends.cudnn.flags(allow_tf32=False):  # which its convolution would take
        require_same(package, Setting(base, min(asked.rows), row_dim, LAYERS, text))
    note("weights", [float(base.model.num_parameters())], f"parameters ({base.weights})")
    for rows in asked.rows:
        setting, label = Setting(base, rows, row_dim, LAYERS, text), f"{rows / 1e6:g}M"
        if asked.part == "speeds":
            speeds(builds, setting, label, asked, blocks, note)
            continue
        with blocks.compiled(True):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                alone = [float(base.model(input_ids=ids, labels=ids).loss) for ids in text[-HELD_OUT:]]
            note(f"alone-{label}-loss", [sum(alone) / HELD_OUT], "nats a token")
            losses(builds, replace(setting, batches=text[:-HELD_OUT]), text[-HELD_OUT:], label, note)


def tell(case: str, samples: list[float], unit: str, **_: float) -> None:
    """Instead of recording it."""
    print(f"{case}: {median(samples):.6g} {unit}", flush=True)


if __name__ == "__main__":
    main()
