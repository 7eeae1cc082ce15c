"""Hot spots of a lookup: addressing, unique rows, expansion, merge, row update."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from torch_engram.addressing import Addressing, CanonicalVocab
from torch_engram.bench.ops import TOLERANCE, Op, Sizes, Work, Wrap, nbytes, op
from torch_engram.config import EngramConfig
from torch_engram.kernels import naive
from torch_engram.memory import segments as index
from torch_engram.memory.segments import Segments, unique_rows
from torch_engram.optim import RowwiseAdam
from torch_engram.stores import DecodedRows, Plane, RecordLayout, RowFormat

COLUMNS = 16
"""Rows that a token reads in a layer: orders 2 and 3, 8 heads each."""


def natural_ids(reads: int, rows: int, device: torch.device | str) -> Tensor:
    """Row ids int64 ``[reads]`` as of natural text: 58 in 100 by rank of use, where each power of two of the ranks is
    as likely as any other (so the first row gets one read in 41), the rest at random; ranks are strewn over the
    table."""
    ranked = torch.rand(reads, device=device) < 0.58
    rank = torch.rand(reads, dtype=torch.float64, device=device).mul(24).exp2().long()
    return torch.where(ranked, rank * 2_654_435_761 % rows, torch.randint(rows, (reads,), device=device))


@op
def addressing(sizes: Sizes) -> Op:
    """Row ids of two layers. Moved: tokens, document starts, the canonical map's entry of a token, row ids."""
    config = EngramConfig(
        layers=(1, 2), hidden=sizes.hidden, vocab_size=sizes.vocab, max_ngram=3, heads=COLUMNS // 2, row_dim=1,
        rows_per_head=max(1, sizes.rows // COLUMNS),
    )  # fmt: skip
    found = Addressing(config, CanonicalVocab(torch.arange(sizes.vocab), "identity"))
    spread = torch.rand(64, sizes.tokens // 64, device=sizes.device).double()
    tokens = (sizes.vocab**spread).long().clamp_(max=sizes.vocab - 1)  # as frequent as rare, about
    start = torch.rand(tokens.shape, device=sizes.device) < 1e-3

    def ours() -> list[Tensor]:
        lookup = found.lookup(tokens, doc_start=start, with_mixes=False)
        return [lookup(layer)[1] for layer in config.layers]

    def twin() -> list[Tensor]:
        windows = found.windows(tokens, doc_start=start)
        return [found.rows(windows, layer)[1] for layer in config.layers]

    moved = nbytes(tokens, start) + 8 * tokens.numel() + 8 * len(config.layers) * COLUMNS * tokens.numel()
    return Op(ours, lambda wrap: wrap(twin), lambda: zip(ours(), twin(), strict=True), moved)


@op
def unique(sizes: Sizes) -> Op:
    """Distinct rows, and the reads sorted by row, of one layer. Moved: ids, and the four results that are made."""
    ids = natural_ids(sizes.tokens * COLUMNS, sizes.rows, sizes.device)

    def ours() -> list[Tensor]:
        distinct, first, segments = unique_rows(ids, sizes.rows)
        return [distinct, first, segments.inverse, segments.order, segments.starts]

    def twin() -> list[Tensor]:
        distinct, inverse = torch.unique(ids, return_inverse=True)
        segments = Segments.of(inverse, len(distinct))
        return [distinct, segments.order[segments.starts], inverse, segments.order, segments.starts]

    moved = nbytes(ids, *ours())
    return Op(ours, lambda wrap: wrap(twin), lambda: zip(ours(), twin(), strict=True), moved)


def _read(sizes: Sizes) -> tuple[Segments, int]:
    """One layer's reads, and the width of a row."""
    ids = natural_ids(sizes.tokens * COLUMNS, sizes.rows, sizes.device)
    return unique_rows(ids, sizes.rows)[2], sizes.hidden // COLUMNS


@op
def expand(sizes: Sizes) -> Op:
    """Rows to embeddings, one layer. Moved: fp32 rows and the places of the reads read, embeddings written."""
    segments, dim = _read(sizes)
    values = torch.randn(len(segments.starts), dim, device=sizes.device)
    out = torch.empty(len(segments.inverse), dim, device=sizes.device, dtype=sizes.dtype)

    def ours() -> Tensor:
        return index.expand(values, segments.inverse, out)

    def twin() -> Tensor:
        return values[segments.inverse].to(sizes.dtype)

    moved = nbytes(values, segments.inverse, out)
    return Op(ours, lambda wrap: wrap(twin), lambda: [(ours(), twin())], moved, tolerance=TOLERANCE[sizes.dtype])


@op
def merge(sizes: Sizes) -> Op:
    """Gradients of embeddings to those of rows, one layer. Moved: gradients, their order and the rows' starts read,
    fp32 sums written."""
    segments, dim = _read(sizes)
    grads = torch.randn(len(segments.inverse), dim, device=sizes.device).to(sizes.dtype)
    out = torch.empty(len(segments.starts), dim, device=sizes.device)

    def ours() -> Tensor:
        return index.merge(grads, segments, out)

    def twin(grads: Tensor, inverse: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        return index.merge_naive(grads, Segments(inverse, order, starts))

    parts = (grads, segments.inverse, segments.order, segments.starts)
    moved = nbytes(grads, segments.order, segments.starts, out)
    return Op(ours, lambda wrap: partial(wrap(twin), *parts), lambda: [(ours(), twin(*parts))], moved)


@op
def row_update(sizes: Sizes) -> Op:
    """Row-wise Adam on the rows of one layer, written in bf16 with stochastic rounding. Moved: values, gradients and
    keys read, a row's moment and count read and written, encoded values written."""
    segments, dim = _read(sizes)
    count = len(segments.starts)
    optimizer = RowwiseAdam([nn.Parameter(torch.empty(0, dim, device=sizes.device))], lr=0.01)
    planes = (Plane("value", dim, "bf16"), Plane("count", 1, "int32"), *optimizer.planes(dim))
    row_format = RowFormat(RecordLayout(planes))
    keys, grad = torch.arange(count, device=sizes.device), torch.randn(count, dim, device=sizes.device)
    fresh = {"value": torch.randn_like(grad), "moment": torch.rand(count, 1, device=sizes.device)}
    fresh["count"] = torch.ones(count, 1, dtype=torch.int32, device=sizes.device)
    records = row_format.encode(keys, fresh)

    def ours(rows: DecodedRows) -> Tensor:
        rows.encoded = False
        (proxy,) = optimizer.param_groups[0]["params"]
        proxy.data, proxy.grad, optimizer.state[proxy] = rows["value"], grad, rows
        optimizer.step()
        return rows.encode()

    def twin(rows: dict[str, Tensor]) -> Tensor:
        rows["count"] += 1
        optimizer.update(rows["value"], grad, rows, optimizer.param_groups[0])
        return row_format.encode(keys, rows)

    def copies() -> dict[str, Tensor]:
        with naive():
            return dict(DecodedRows(row_format, keys, records.clone()))

    def results() -> Iterator[tuple[Tensor, Tensor]]:
        written = (ours(DecodedRows(row_format, keys, records.clone())), twin(copies()))
        mine, theirs = (row_format.decode(keys, found) for found in written)
        return ((mine[name], theirs[name]) for name in theirs)

    def twin_work(wrap: Wrap) -> Work:
        return partial(wrap(twin), copies())

    timed = DecodedRows(row_format, keys, records.clone())
    moved = nbytes(grad, grad, keys) + 2 * grad.numel() + 4 * nbytes(fresh["count"])
    return Op(lambda: ours(timed), twin_work, results, moved, tolerance=TOLERANCE[torch.bfloat16])
