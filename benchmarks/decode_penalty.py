"""decode-penalty-4b, -8b: how much slower a whole model decodes with a memory whose table lies in the host's memory.

    python benchmarks/decode_penalty.py natural.txt.xz tokenizer.json

Decoders in the shapes of Qwen3's 4 B and 8 B, of random weights in bf16, decode 512 sequences, which have evenly from
100 to 1,024 tokens at first and take 24 steps a round. All is in CUDA graphs. What the sequences say next is replayed
from the second half of a natural text (`dev/build_natural_text.py`), fresh in every round; the first half has filled
the cache. The memory is `deepseek-v4.1`'s at block 2, with one branch, its table of 64 GB in host memory behind a
cache of 8 GB in HBM.

In every round take their turns the model without memory (as one graph a step and as two: the quicker counts), with a
table of 1 GB in HBM, and with the table in host memory. Of the tokens a second of one round:

- penalty: host memory below no memory; fusion: HBM below no memory; placement: host memory below HBM.

Beside them stands what share of the card's copy rate the model without memory reaches, counting its weights and the
keys and values that it reads: a slow model would hide what a memory costs. It cannot be the whole of it, since products
with 512 rows take longer than their weights to read.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Mapping

import torch
from decoding.model import SHAPES, Shape
from decoding.replay import LAYER, PROMPT, Batch, Decoding, Remembered
from decoding.stand import Note, Text, below, build, engram_for, notes, take, tell
from sparse_tables import host_bank

from torch_engram.bench.timing import copy_rate, median
from torch_engram.memory import DecodeMemory, MemoryBank

SMALL_GB = 1.0


def ways(batch: Batch, banks: Mapping[str, MemoryBank]) -> dict[str, Decoding]:
    """What takes turns, by name."""
    module = engram_for(banks["host"], batch.model.shape.hidden)
    found = {"dense-1-graph": Decoding(batch, graphs=1), "dense-2-graphs": Decoding(batch)}
    for name, bank in banks.items():
        found[name] = Decoding(batch, Remembered(bank, DecodeMemory(bank, len(batch.text)), module))
    return found


def measure(shape: Shape, banks: Mapping[str, MemoryBank], text: Text, asked: argparse.Namespace, note: Note) -> None:
    """One shape: all rounds, then what is recorded of them."""
    device, rate = banks["host"].device, copy_rate(banks["host"].device)
    tokens = text.fresh(asked.sequences, PROMPT + (asked.rounds + 1) * asked.steps + 1)
    batch = build(shape, asked.sequences, asked.steps, tokens, device)
    rates, found = take(ways(batch, banks), banks["host"], asked.rounds, asked.steps)
    quicker = max(("dense-1-graph", "dense-2-graphs"), key=lambda name: median(rates[name]))
    dense, hbm, host = rates[quicker], rates["hbm"], rates["host"]
    for case, slow, fast in (("penalty", host, dense), ("fusion", hbm, dense), ("placement", host, hbm)):
        note(case, below(slow, fast), "share", reference=median(fast), ratio=median(slow) / median(fast))
    for name, samples in rates.items():
        note(f"{name}-speed", samples, "tokens/s", reference=median(dense), ratio=median(samples) / median(dense))
    moved = batch.model.bytes_read + batch.cache.bytes_read(asked.steps)
    milliseconds = [1e3 * asked.sequences / speed for speed in dense]
    note("dense-of-copy-rate", [moved / took / rate for took in milliseconds], "share", reference=rate / 1e9)
    if found is not None:
        note("hits", [found], "of n-grams")
    assert bool(batch.logits.isfinite().all()), "what was computed is not finite"
    if device.type == "cuda":
        tell(f"peak of memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="of dev/build_natural_text.py, or demo")
    parser.add_argument("tokenizer", help="DeepSeek-V4's tokenizer.json")
    parser.add_argument("--shapes", nargs="+", choices=("4b", "8b"), default=["4b", "8b"])
    parser.add_argument("--gigabytes", type=float, default=64.0, help="of the table in host memory")
    parser.add_argument("--cache", default="8GB")
    parser.add_argument("--warm", type=int, default=13_000_000, help="tokens that fill the cache, at most")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--tiny", action="store_true", help="a toy model, nothing recorded; runs on a CPU")
    asked = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = Text(asked.text, asked.tokenizer)
    tell("text is there")
    banks = {
        "hbm": host_bank((LAYER,), min(SMALL_GB, asked.gigabytes), text.vocab, None, device, placement="device"),
        "host": host_bank((LAYER,), asked.gigabytes, text.vocab, asked.cache, device),
    }
    tell("tables are there")
    warmed = text.warm(banks["host"], asked.warm)
    tell(f"cache filled with {warmed:,} tokens")
    for name in ["tiny"] if asked.tiny else asked.shapes:
        note = notes(f"decode-penalty-{name}", device, keep=not asked.tiny)
        measure(SHAPES[name], banks, text, asked, note)
        note("warmed", [float(warmed)], "tokens")
        note("table", [asked.gigabytes], "GB")
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
