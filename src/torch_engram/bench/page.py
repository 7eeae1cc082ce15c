"""The plots of a benchmark: one HTML page with bars and the table that they show."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch_engram.analysis.charts import Series, bar_groups, legend
from torch_engram.analysis.origin import device_name, versions
from torch_engram.analysis.page import page, percent, section, table
from torch_engram.bench.lookups import LookupTimes
from torch_engram.bench.ops import OPS, Sizes, Timed
from torch_engram.bench.results import Measurement, quantiles
from torch_engram.bench.steps import StepTimes
from torch_engram.bench.timing import median

_LIMIT, _OURS, _AGAINST = 0, 1, 2
"""Colours."""
OPS_HEAD = ("p20", "p50", "p80", "limit", "times it")
LOOKUP_HEAD = ("p20", "p50", "p80", "p99", "M rows/s", "GB/s", "limit", "of it", "distinct", "MB from disk")
LIMITS = {
    "memory-copy": "a copy in the host's memory, read and written both counted",
    "memory-gather": "random rows out of the host's memory",
    "bus-copy": "pinned memory to the GPU",
    "gpu-copy": "a copy in the GPU's memory, read and written both counted",
    "gpu-gather": "random rows out of the GPU's memory",
    "disk-4k": "random blocks of 4 KiB past the page cache",
    "disk-4k-reads": "the same in reads a second",
    "disk-rows": "random rows past the page cache, the rows counted and not their blocks",
}
"""What each limit is."""
STEP_HEAD = ("p20", "p50", "p80", "tokens/s", "MFU", "GiB", "lookups")
READING = (
    "The limit is what this device could do at best: the bytes that must move, at the rate of a copy, and the matrix "
    "products that must be done, as torch.mm does them, both measured in the same run. 1.0 times it is out of reach,"
    " unless all that is touched fits into caches, as small sizes do on a CPU."
)


def ops_page(timed: Sequence[Timed], sizes: Sizes, against: str | None) -> str:
    """Limit, ours and the twin of every op."""
    medians = [(one.limit, median(one.ours), median(one.against) if one.against else None) for one in timed]
    entries = [("limit", _LIMIT), ("this library", _OURS), *([(against, _AGAINST)] if against else [])]
    series = [
        Series(label, color, [(i, ms) for i, found in enumerate(medians) if (ms := found[color]) is not None])
        for label, color in entries
    ]
    names = [f"{one.name}: {one.ratio:.2f} times the limit" for one in timed]
    chart = bar_groups(series, names, title="Each group to its own scale", show=digits)
    head = ["op", *OPS_HEAD, *([against, "speed-up"] if against else [])]
    rows = [(escape(one.name), op_cells(one, against)) for one in timed]
    counted = [f"{one.name}: {' '.join((OPS[one.name].__doc__ or '').split())}" for one in timed]
    body = legend(entries) + f'<div class="charts">{chart}</div>' + table(head, rows)
    return _page("Kernels", sizes.device, sizes.describe(), section("Times in milliseconds", body, READING, *counted))


def steps_page(timed: Sequence[StepTimes], settings: str, against: str | None) -> str:
    """Tokens a second of every recipe, and of its other form. ``settings``: what was changed in the recipes."""
    entries = [("as the recipe is", _OURS), *([(against, _AGAINST)] if against else [])]
    speeds = [
        (0.0, median(one.speed), one.recipe.tokens_per_step * 1e3 / median(one.against) if one.against else 0.0)
        for one in timed
    ]
    series = [Series(label, color, [(i, found[color]) for i, found in enumerate(speeds)]) for label, color in entries]
    names = [one.recipe.name for one in timed]
    chart = bar_groups(series, names, title="Tokens a second", one_scale=True)
    head = ["recipe", *STEP_HEAD, *([against, "speed-up"] if against else [])]
    rows = [(escape(one.recipe.name), step_cells(one, against)) for one in timed]
    body = legend(entries) + f'<div class="charts">{chart}</div>' + table(head, rows)
    device = timed[0].recipe.device
    notes = (
        "GiB: the most that a run took on the GPU.",
        "MFU: model FLOPs a second (3 times the forward's) over those of one large torch.mm in the same run.",
        "Lookups: the share of the step that goes away when embeddings are constants that nobody fetches.",
    )
    return _page(
        "Training steps",
        device,
        settings or "recipes as they are",
        section("Steps, times in milliseconds", body, *notes),
    )


def lookup_page(
    timed: Sequence[LookupTimes], found: Sequence[Measurement], device: str, settings: str, notes: Sequence[str]
) -> str:
    """GB/s of every placement and mode beside its limit, then the limits; ``notes`` say how to read them."""
    names = [f"{one.placement}, {one.mode.name}" for one in timed]
    limits = [(i, median(list(one.limit.samples))) for i, one in enumerate(timed) if one.limit is not None]
    entries = [("limit", _LIMIT), ("delivered", _OURS)]
    delivered = [(i, median(one.delivered)) for i, one in enumerate(timed)]
    series = [Series(*entry, points) for entry, points in zip(entries, (limits, delivered), strict=True)]
    chart = bar_groups(series, names, title="GB/s, each group to its own scale", show=digits)
    rows = [(escape(name), lookup_cells(one)) for name, one in zip(names, timed, strict=True)]
    body = legend(entries) + f'<div class="charts">{chart}</div>' + table(["read", *LOOKUP_HEAD], rows)
    orders, hits = hit_rows(timed)
    cached = section("Hit rates of the cache", table(["read", *orders], [
        (escape(f"{placement}, {mode}"), cells) for placement, mode, *cells in hits
    ])) if hits else ""  # fmt: skip
    of_limits = [(escape(one.case), limit_cells(one)) for one in found]
    return _page(
        "Lookups", device, settings,
        section("Reads, times in microseconds", body, *notes)
        + cached
        + section("Limits measured in the same run", table(["limit", "rate", "unit", "what it is"], of_limits)),
    )  # fmt: skip


def lookup_cells(one: LookupTimes) -> list[str]:
    """Texts for :data:`LOOKUP_HEAD`."""
    limit = "–" if one.limit is None else digits(median(list(one.limit.samples)))
    ratio = "–" if one.ratio is None else f"{one.ratio:.2f}"
    disk = "–" if one.from_disk is None else digits(median(one.from_disk))
    rates = (digits(median(one.rows_per_second) / 1e6), digits(median(one.delivered)))
    times = map(digits, (*quantiles(one.microseconds), one.p99))
    return [*times, *rates, limit, ratio, percent(median(one.distinct)), disk]


def hit_rows(timed: Sequence[LookupTimes]) -> tuple[list[str], list[list[str]]]:
    """Columns of hit rates, and the texts of what had a cache: placement, mode, all orders together, then each."""
    found = [(one.placement, one.mode.name, one.hits) for one in timed if one.hits is not None]
    rows = [
        [placement, mode, *map(percent, (hits.together, *hits.rates.values()))] for placement, mode, hits in found
    ]  # fmt: skip
    return ["hits", *(f"{order}-grams" for order in (found[0][2].rates if found else ()))], rows


def limit_cells(one: Measurement) -> list[str]:
    """Rate, unit and meaning of a limit."""
    return [digits(one.quantiles[1]), one.unit, LIMITS[one.case]]


def op_cells(one: Timed, against: str | None) -> list[str]:
    """Texts for :data:`OPS_HEAD`, then the twin's milliseconds and the speed-up where there is a comparison."""
    cells = [*map(digits, (*quantiles(one.ours), one.limit)), f"{one.ratio:.2f}"]
    return cells + _compared(one.against, one.speed_up) if against else cells


def step_cells(one: StepTimes, against: str | None) -> list[str]:
    """Texts for :data:`STEP_HEAD`, then as :func:`op_cells`."""
    memory = "–" if one.run.memory is None else f"{one.run.memory:.1f}"
    exposed = "–" if one.exposed is None else f"{100 * median(one.exposed):.1f} %".replace("-", "−")  # noise may be < 0
    speed, share = f"{median(one.speed):,.0f}", percent(median(one.utilisation))
    cells = [*map(digits, quantiles(one.ours)), speed, share, memory, exposed]
    speed_up = None if one.speed_up is None else median(one.speed_up)
    return cells + _compared(one.against, speed_up) if against else cells


def _compared(against: list[float] | None, speed_up: float | None) -> list[str]:
    if against is None or speed_up is None:
        return ["–", "–"]
    return [digits(median(against)), f"{speed_up:.2f}"]


def digits(value: float) -> str:
    """Three digits, more before the point: 0.106, 2.31, 154, 12,345."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _page(title: str, device: str, what: str, body: str) -> str:
    lead = escape(f"{device_name(device)}; {versions()}; {what}")
    return page(f"{title}: {device_name(device)}", f'<h1>{escape(title)}</h1><p class="lead">{lead}</p>{body}')
