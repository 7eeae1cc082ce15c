"""Where the index work of a step stands on a GPU: addressing, unique, expand, merge, and the constants of merge.

    python dev/experiments/segments.py

Prints medians in milliseconds by CUDA events, against the time that the same bytes take at this device's copy rate.
One step of 65,536 tokens, 16 columns of width 64, a table of 10 M rows; about as many rows are read once, and the
most-read one as often (some 25,000 times), as in natural text.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from torch_engram.addressing import Addressing, CanonicalVocab
from torch_engram.config import EngramConfig
from torch_engram.memory import segment_kernels
from torch_engram.memory.segments import Segments, expand, merge, unique_rows

TOKENS, COLUMNS, DIM, ROWS, VOCAB = 65_536, 16, 64, 10_000_000, 99_092
READS = TOKENS * COLUMNS


def natural_ids(reads: int, rows: int, device: torch.device) -> Tensor:
    """Row ids int64 ``[reads]``: 58 in 100 by rank of use, where each power of two of the ranks is as likely as any
    other (so the first row gets one read in 41), the rest at random; ranks are strewn over the table."""
    ranked = torch.rand(reads, device=device) < 0.58
    rank = torch.rand(reads, dtype=torch.float64, device=device).mul(24).exp2().long()
    return torch.where(ranked, rank * 2_654_435_761 % rows, torch.randint(rows, (reads,), device=device))


def milliseconds(call: Callable[[], object], times: int = 20) -> float:
    """Median time of a call on the device, and on the host where it waits."""
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def show(what: str, time: float, floor: float | None = None) -> None:
    print(f"{what:<44} {time:8.3f} ms" + (f"   bytes alone {floor:.3f} ms" if floor is not None else ""), flush=True)


def addressing(device: torch.device) -> None:
    config = EngramConfig(
        layers=(1, 14), hidden=8, vocab_size=VOCAB, max_ngram=3, heads=8, row_dim=1, rows_per_head=ROWS // COLUMNS
    )
    found = Addressing(config, CanonicalVocab(torch.arange(VOCAB), "identity"))
    tokens = (
        torch.rand(16, TOKENS // 16, device=device).mul(torch.tensor(VOCAB).log()).exp().long().clamp(max=VOCAB - 1)
    )
    start = torch.rand(tokens.shape, device=device) < 1e-3

    def naive() -> None:
        windows = found.windows(tokens, doc_start=start)
        for layer in config.layers:
            found.rows(windows, layer)

    show("addressing of 2 layers, windows and hashes", milliseconds(naive))
    show("addressing of 2 layers, the kernel", milliseconds(lambda: found.lookup(tokens, doc_start=start)))
    no_mixes = milliseconds(lambda: found.lookup(tokens, doc_start=start, with_mixes=False))
    show("addressing of 2 layers, without mixes", no_mixes)


def unique(ids: Tensor) -> None:
    show("sort of int64 alone", milliseconds(lambda: ids.sort(stable=True)))
    narrow = ids.to(torch.int32)
    show("sort of int32 alone", milliseconds(lambda: narrow.sort(stable=True)))
    show("unique, int64 keys", milliseconds(lambda: unique_rows(ids)))
    show("unique, int32 keys", milliseconds(lambda: unique_rows(ids, ROWS)))


def merging(segments: Segments, gigabytes: float) -> None:
    rows = len(segments.starts)
    grads = torch.randn(READS, DIM, device=segments.order.device, dtype=torch.bfloat16)
    out, wide = torch.empty(rows, DIM, device=grads.device), grads.float()
    add = milliseconds(lambda: out.zero_().index_add_(0, segments.inverse, wide))
    show("index_add_ of fp32 (sums in no fixed order)", add)
    floor = (READS * (2 * DIM + 8) + rows * (4 * DIM + 8)) / gigabytes / 1e6
    show("merge", milliseconds(lambda: merge(grads, segments, out)), floor)
    for name, values in (
        ("_PIECE", (16, 32, 64, 128)),
        ("_HEADS", (512, 1024, 2048)),
        ("_READS_AHEAD", (1, 2, 4, 8)),
    ):
        before = getattr(segment_kernels, name)
        for value in values:
            setattr(segment_kernels, name, value)
            show(f"merge with {name} = {value}", milliseconds(lambda: merge(grads, segments, out)))
        setattr(segment_kernels, name, before)


def expanding(segments: Segments, gigabytes: float) -> None:
    rows = len(segments.starts)
    values = torch.randn(rows, DIM, device=segments.order.device)
    out = torch.empty(READS, DIM, device=values.device, dtype=torch.bfloat16)
    floor = (READS * (2 * DIM + 8) + rows * 4 * DIM) / gigabytes / 1e6
    show("expand", milliseconds(lambda: expand(values, segments.inverse, out)), floor)
    records = torch.randn(rows, DIM + 2, device=values.device)[:, :DIM]
    show("expand of rows 66 numbers apart", milliseconds(lambda: expand(records, segments.inverse, out)), floor)
    before = segment_kernels._EXPANDED
    for value in (1024, 2048, 4096):
        segment_kernels._EXPANDED = value
        show(f"expand with _EXPANDED = {value}", milliseconds(lambda: expand(values, segments.inverse, out)))
    segment_kernels._EXPANDED = before


def main() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    block = torch.empty(2**29, dtype=torch.uint8, device=device)
    to = torch.empty_like(block)
    gigabytes = 2 * block.numel() / milliseconds(lambda: to.copy_(block)) / 1e6
    print(f"copies {gigabytes:,.0f} GB/s")
    ids = natural_ids(READS, ROWS, device)
    distinct, _, segments = unique_rows(ids, ROWS)
    print(f"{READS:,} reads of {len(distinct):,} rows, the most-read one {int(segments.inverse.bincount().max()):,}")
    addressing(device)
    unique(ids)
    merging(segments, gigabytes)
    expanding(segments, gigabytes)


if __name__ == "__main__":
    main()
