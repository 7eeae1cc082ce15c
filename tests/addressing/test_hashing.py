"""The fast remainder equals Python's, at every place where an estimate could slip."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.addressing.hashing import _BLOCK, _LARGEST_PRIME, mixes, reducer, rows_naive
from torch_engram.addressing.primes import next_prime

LARGEST_USED = 67_108_859  # the largest prime up to 2**26
PRIMES = (2, 3, 5, 97, 16_381, 16_411, 646_411, 16_000_057, 20_000_003, LARGEST_USED)


def expected(mix: list[list[int]], primes: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    rows = []
    for position in mix:
        offset, row = 0, []
        for value, heads in zip(position, primes, strict=True):
            for prime in heads:
                row.append(value % prime + offset)
                offset += prime
        rows.append(row)
    return rows


def rows_by_limbs(mix: Tensor, primes: tuple[Tensor, ...], offsets: Tensor) -> Tensor:
    return reducer(primes, offsets)(mix)


def constants(primes: tuple[tuple[int, ...], ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    flat = [prime for heads in primes for prime in heads]
    offsets = [sum(flat[:i]) for i in range(len(flat))]
    return tuple(torch.tensor(heads) for heads in primes), torch.tensor(offsets)


@pytest.mark.parametrize("reduce", [rows_naive, rows_by_limbs])
@pytest.mark.parametrize("prime", [*PRIMES, 67_108_879, 2**31 - 1, 2**61 - 1])
def test_around_multiples_of_the_prime_and_the_ends_of_int64(reduce: object, prime: int) -> None:
    assert callable(reduce)
    most = (2**63 - 1) // prime
    generator = torch.Generator().manual_seed(prime)
    drawn = [int(x) for x in torch.randint(0, most + 1, (500,), generator=generator)]
    quotients = {0, 1, 2, most, most - 1, most // 2, *drawn, *(2**k for k in range(63) if 2**k <= most)}
    near = {q * prime + d for q in quotients for d in (-2, -1, 0, 1, 2)} | {
        2**k + d for k in range(64) for d in (-1, 0, 1)
    }
    mix = [[value] for value in sorted(near) if 0 <= value < 2**63]
    primes = ((prime,),)
    assert reduce(torch.tensor(mix), *constants(primes)).tolist() == expected(mix, primes)


@given(st.data())
def test_any_mix_of_orders_heads_and_primes(data: st.DataObject) -> None:
    prime = st.sampled_from(PRIMES) | st.integers(1, _LARGEST_PRIME - 100).map(next_prime)
    primes = data.draw(st.lists(st.lists(prime, min_size=1, max_size=4).map(tuple), min_size=1, max_size=3).map(tuple))
    value = st.integers(0, 2**63 - 1)
    mix = data.draw(st.lists(st.lists(value, min_size=len(primes), max_size=len(primes)), max_size=20))
    tensor = torch.tensor(mix, dtype=torch.int64).view(-1, len(primes))
    for reduce in (rows_naive, rows_by_limbs):
        assert reduce(tensor, *constants(primes)).tolist() == expected(mix, primes)


def test_offsets_past_two_to_the_33rd_are_exact() -> None:
    primes = ((LARGEST_USED,) * 300,)
    mix = torch.randint(0, 2**63 - 1, (50, 1))
    assert torch.equal(rows_by_limbs(mix, *constants(primes)), rows_naive(mix, *constants(primes)))
    assert rows_by_limbs(mix, *constants(primes)).max() > 2**33


@pytest.mark.parametrize("positions", [0, 1, _BLOCK - 1, _BLOCK, _BLOCK + 1, 2 * _BLOCK + 3])
def test_any_number_of_positions_and_strides(positions: int) -> None:
    primes = ((16_000_057, 646_411), (97,))
    mix = torch.randint(0, 2**63 - 1, (2, positions, 2))
    for laid_out in (
        mix,
        mix.movedim(-1, 0).contiguous().movedim(0, -1),
        torch.cat((mix, mix), dim=1)[:, ::2][:, :positions],
    ):
        rows = rows_by_limbs(laid_out, *constants(primes))
        assert rows.shape == (2, positions, 3) and rows.is_contiguous()
        assert torch.equal(rows, rows_naive(laid_out, *constants(primes)))


@given(st.lists(st.integers(0, 99_091), min_size=4, max_size=4))
def test_mixes_are_xors_of_products(window: list[int]) -> None:
    multipliers = (76632096046245, 4839876093313, 35959672319349, 73987337458391)
    total, by_hand = window[0] * multipliers[0], []
    for x, m in zip(window[1:], multipliers[1:], strict=True):
        total ^= x * m
        by_hand.append(total)
    assert mixes(torch.tensor([[window]]), torch.tensor(multipliers)).tolist() == [[by_hand]]
