"""A cache's table, both forms: what a read gets is what was fetched for it, always; the budget holds; the oldest go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.stores import slot_kernels, slots
from torch_engram.stores.slots import CLAIMED, COUNTS, EMPTY, LAST_TAG, WAYS, Found, Reads, Region, Slots, pick

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NBYTES = 24
REGIONS = (Region(0, 0, parts=2), Region(0, 1, parts=1, first_column=2), Region(3, 0, 2, 0, 3 << 40),
           Region(3, 1, 1, 2, 3 << 40))  # fmt: skip
reuse = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)


@pytest.fixture(params=["naive", "kernel"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(slots, "use_kernels", lambda tensor: request.param == "kernel")
    if DEVICE.type == "cpu":
        monkeypatch.setattr(slot_kernels, "_READS", 64)  # so that some batches take several programs
    yield request.param


def least(regions: Sequence[Region] = REGIONS) -> int:
    return max(WAYS * (region.parts * NBYTES + 12) for region in regions) * len(regions)


def table(sets: int = 1, regions: Sequence[Region] = REGIONS) -> Slots:
    return Slots(regions, NBYTES, sets * least(regions), DEVICE)


def record_of(keys: Tensor) -> Tensor:
    """A record that tells its key."""
    return (keys[:, None] * 37 + torch.arange(NBYTES // 8, device=DEVICE)).view(torch.uint8)


def ngrams(slots: Slots, tags: Tensor) -> Reads:
    """Tags ``[2, n, 2]``; the three rows of a position follow from them."""
    tags = tags.to(DEVICE)
    rows = (tags[..., [0, 0, 1]] * 3 + torch.tensor([0, 1, 2], device=DEVICE)) & (2**40 - 1)
    return Reads(tags.flatten(), rows.view(-1, 3), slots.plan((0, 3)), 2, max(1, tags.shape[1]))


def keys_of(reads: Reads) -> list[Tensor]:
    """The keys that each read must get."""
    found = []
    for read, which in enumerate(reads.which().tolist()):
        parts, column, offset = reads.regions[which, 3:6].tolist()
        found.append(reads.rows[read // reads.groups, column : column + parts] + offset)
    return found


def check(slots: Slots, reads: Reads) -> Found:
    """Serve a batch; every read gets its own records, whatever was evicted for the others."""
    before, there = slots.counts.clone(), slots.tags.clone()
    slots.tick()
    found = slots.find(reads)
    found = found.first(int(found.count[0]))
    fetched = record_of(found.keys)
    slots.fill(found, fetched)
    for where, keys in zip(found.where.tolist(), keys_of(reads), strict=True):
        index = where + torch.arange(len(keys), device=DEVICE) * (1 if where >= 0 else -1)
        assert torch.equal(pick(slots.records, fetched, index), record_of(keys))
    check_tags(slots)
    counts = (slots.counts - before).sum(0).tolist()
    hits, repeats, misses, _, overflow = counts
    assert hits + repeats + misses == len(reads.tags) and 0 <= overflow <= misses
    assert (slots.tags != there).sum() == misses - overflow
    return found


def check_tags(slots: Slots) -> None:
    """Nothing is left claimed, and no set has a tag twice."""
    assert not ((slots.tags < 0) & (slots.tags != EMPTY)).any()
    for ways in slots.tags.view(-1, WAYS).tolist():
        held = [tag for tag in ways if tag != EMPTY]
        assert len(held) == len(set(held))


@reuse
@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 200)), max_size=4), st.integers(0, 99))
def test_every_read_gets_its_rows(sets: int, batches: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    slots = table(sets)
    assert slots.nbytes <= sets * least()
    for positions, distinct in batches:
        check(slots, ngrams(slots, torch.randint(distinct, (2, positions, 2))))


@reuse
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(0, 99))
def test_rows_of_all_spaces_in_one_batch(batches: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    slots = table(2, [Region(0), Region(2)])
    by_space = torch.tensor([0, -1, 1], device=DEVICE)
    for rows in batches:
        keys = (torch.randint(50, (rows,)) | torch.randint(2, (rows,)) << 41).to(DEVICE)
        check(slots, Reads(keys, keys[:, None], slots.plan(), 1, rows, by_space))


def test_both_forms_keep_and_evict_the_same(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """As long as no set overflows: then all that differs is who gets which place."""
    if form == "naive":
        return
    mine, twin = table(3), table(3)
    for _ in range(5):
        tags = torch.randint(60, (2, 12, 2))
        for kept in ("tags", "stamps", "records"):
            getattr(twin, kept).copy_(getattr(mine, kept))
        check(mine, ngrams(mine, tags))
        with monkeypatch.context() as patch:
            patch.setattr(slots, "use_kernels", lambda tensor: False)
            check(twin, ngrams(twin, tags))
        assert not twin.counts[:, COUNTS.index("overflow")].any()
        assert torch.equal(mine.counts, twin.counts)
        assert torch.equal(*(one.tags.view(-1, WAYS).sort(1)[0] for one in (mine, twin)))
    assert twin.counts[:, COUNTS.index("evictions")].any()


def test_the_one_not_read_for_longest_goes() -> None:
    one = [Region(0)]
    slots = table(1, one)

    def read(*tags: int) -> dict[str, int]:
        before = slots.counts.sum(0)
        keys = torch.tensor(tags, device=DEVICE)
        check(
            slots, Reads(keys, keys[:, None], slots.plan(), 1, len(tags), torch.zeros(1, dtype=torch.int64).to(DEVICE))
        )
        return dict(zip(COUNTS, (slots.counts.sum(0) - before).tolist(), strict=True))

    assert read(*range(WAYS))["misses"] == WAYS
    read(*range(1, WAYS))
    assert read(100)["evictions"] == 1
    assert read(*range(1, WAYS), 100)["hits"] == WAYS
    assert read(0) == dict(hits=0, repeats=0, misses=1, evictions=1, overflow=0)
    full = read(*range(200, 200 + WAYS), 300)
    assert full["overflow"] == 1 and full["evictions"] == WAYS
    assert read(0, 0, 0)["repeats"] == 2


def test_tags_at_both_ends() -> None:
    """0, which pads give, and the largest; what is no tag is served without a place."""
    slots = table(2)
    tags = torch.tensor([0, LAST_TAG, LAST_TAG + 1, EMPTY, CLAIMED, 5]).view(1, 3, 2).expand(2, 3, 2).contiguous()
    for _ in range(2):
        check(slots, ngrams(slots, tags))
    assert slots.counts.sum(0).tolist()[:3] == [6, 0, 18]


def test_what_was_not_filled_is_not_found() -> None:
    slots = table()
    reads = ngrams(slots, torch.arange(12).view(2, 3, 2))
    slots.tick()
    slots.release(slots.find(reads))
    check(slots, reads)
    assert not slots.counts[:, 0].any()
    check(slots, reads)
    assert slots.counts[:, 0].sum() == 12
    slots.clear()
    check(slots, reads)
    assert slots.counts[:, 0].sum() == 12


def test_epochs_begin_anew_before_they_overflow() -> None:
    slots = table()
    slots._batches = 2**31 - 3
    slots.clock.fill_(2**31 - 3)
    for number in range(4):
        check(slots, ngrams(slots, torch.arange(number, number + 40).view(2, 10, 2)))
    assert slots.clock.item() == 3


@reuse
@given(st.integers(0, 40), st.integers(0, 99))
def test_overwrite_and_collect(many: int, seed: int) -> None:
    torch.manual_seed(seed)
    slots, by_space = table(2, [Region(0)]), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    keys = torch.randint(40, (30,), device=DEVICE)
    found = check(slots, Reads(keys, keys[:, None], slots.plan(), 1, 30, by_space))
    written = torch.randperm(60, device=DEVICE)[:many]
    new = torch.randint(256, (many, NBYTES), dtype=torch.uint8, device=DEVICE)
    slots.overwrite(Reads(written, written[:, None], slots.plan(), 1, max(1, many), by_space), new)
    expected = record_of(keys)
    at = found.where >= 0  # what got no place is as it was fetched
    for key, record in zip(written.tolist(), new, strict=True):
        expected[(keys == key) & at] = record
    assert torch.equal(slots.collect(found.where, record_of(found.keys)), expected)


def test_a_budget_without_a_set_for_each_region_is_refused() -> None:
    assert len(table().tags) == 4 * WAYS
    with pytest.raises(ValueError, match=f"give {least():,} or more"):
        Slots(REGIONS, NBYTES, least() - 1, DEVICE)


@reuse
@given(st.integers(1, 3), st.lists(st.integers(1, 30), min_size=3, max_size=3), st.integers(0, 99))
def test_a_batch_may_begin_before_the_last_one_is_filled(sets: int, sizes: list[int], seed: int) -> None:
    """Served after the last one, it finds what that one brought, and nothing is fetched twice."""
    slots, generator = table(sets), torch.Generator().manual_seed(seed)
    asked = [ngrams(slots, torch.randint(25, (2, size, 2), generator=generator)) for size in sizes]
    begun = []
    for number, reads in enumerate((*asked, None)):
        if reads is not None:
            slots.tick()
            found = slots.find(reads)
            begun.append((reads, found.first(int(found.count[0]))))
        if number:
            earlier, found = begun[number - 1]
            fetched = record_of(found.keys)
            slots.fill(found, fetched)
            for where, keys in zip(found.where.tolist(), keys_of(earlier), strict=True):
                index = where + torch.arange(len(keys), device=DEVICE) * (1 if where >= 0 else -1)
                assert torch.equal(pick(slots.records, fetched, index), record_of(keys))
    check_tags(slots)
    if sets == 3:  # room for all: each is fetched once
        assert slots.counts[:, 2].sum() == len(torch.cat([found.keys for _, found in begun]).unique()) - int(
            sum((region.parts - 1) * count for region, count in zip(REGIONS, slots.counts[:, 2].tolist(), strict=True))
        )
