"""How rows are divided over ranks: each has one owner, and what a rank holds is numbered without gaps."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.stores import DeviceStore, Plane, RecordLayout, Shard, ShardedStore, make_keys

LAYOUT = RecordLayout((Plane("value", 2),))


@given(rows=st.integers(0, 200), ranks=st.integers(1, 17))
def test_every_row_has_one_owner_and_its_own_number_there(rows: int, ranks: int) -> None:
    every = torch.arange(rows)
    shards = [Shard(rank, ranks) for rank in range(ranks)]
    owners, numbers = shards[0].owners(every), shards[0].own_number(every)
    for rank, shard in enumerate(shards):
        held = every[owners == rank]
        assert torch.equal(numbers[owners == rank], torch.arange(shard.count(rows)))
        assert torch.equal(shard.row(torch.arange(shard.count(rows))), held)


@given(first=st.integers(0, 50), rows=st.integers(0, 50), ranks=st.integers(1, 9))
def test_a_range_of_rows_is_divided_without_a_gap(first: int, rows: int, ranks: int) -> None:
    last = first + rows
    held = [Shard(rank, ranks).of(first, last) for rank in range(ranks)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(first, last))
    for rank, own in enumerate(held):
        assert torch.equal(Shard(rank, ranks).row(Shard(rank, ranks).own_number(own)), own)


def test_rows_past_two_to_the_31_keep_their_numbers() -> None:
    shard, rows = Shard(2, 3), torch.tensor([2, 3 * 2**33 + 2])
    assert shard.owners(rows).tolist() == [2, 2]
    assert torch.equal(shard.row(shard.own_number(rows)), rows)


@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=3), ranks=st.integers(1, 5), data=st.data())
def test_a_share_behaves_as_the_part_of_the_whole_table_that_it_is(
    sizes: list[int], ranks: int, data: st.DataObject
) -> None:
    spaces = dict(enumerate(sizes))
    shard = Shard(data.draw(st.integers(0, ranks - 1)), ranks)
    whole = DeviceStore(LAYOUT, spaces, "cpu")
    share = ShardedStore(
        DeviceStore(LAYOUT, {space: shard.count(rows) for space, rows in spaces.items()}, "cpu"), shard, spaces
    )
    assert share.spaces == spaces
    for number in range(3):
        own = torch.cat([make_keys(space, shard.of(0, rows)) for space, rows in spaces.items()])
        picked = own[torch.rand(len(own)) < 0.5]
        records = torch.randint(256, (len(picked), LAYOUT.nbytes), dtype=torch.uint8)
        assert share.write(picked, records) == whole.write(picked, records) == number + 1 == share.acknowledged
        share.flush()
        assert torch.equal(share.fetch(own), whole.fetch(own))
    for space in spaces:
        assert torch.equal(share.changed(space), whole.changed(space))
        assert torch.equal(share.written(space), whole.written(space))
    assert share.forget_changes() == share.counts_from
    assert all(len(share.changed(space)) == 0 for space in spaces)
