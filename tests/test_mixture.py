"""Shuffled order without a table, and weighted mixtures of sources."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cm3leon.data.shuffle import mixed, shuffled, shuffled_array

seeds = st.integers(0, 2**63)


def order(seed: int, count: int, epoch: int) -> list[int]:
    """The items of an epoch in order."""
    return shuffled_array(seed, np.arange(epoch * count, (epoch + 1) * count), count).tolist()


# ------------------------------------------------------------------------------------------------ order


@given(seeds, st.one_of(st.integers(1, 40), st.integers(1, 3000)), st.integers(0, 2**40))
@settings(max_examples=60)
def test_every_epoch_is_a_permutation(seed: int, count: int, epoch: int) -> None:
    assert sorted(order(seed, count, epoch)) == list(range(count))


@given(seeds, st.integers(1, 10**18), st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
@settings(max_examples=60)
def test_one_position_is_as_many(seed: int, count: int, positions: list[int]) -> None:
    items_B = shuffled_array(seed, np.array(positions), count)
    assert items_B.dtype == np.int64
    assert items_B.tolist() == [shuffled(seed, position, count) for position in positions]
    assert ((items_B >= 0) & (items_B < count)).all()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(order(seed, 30, epoch)) for seed in range(20) for epoch in range(20)]
    assert len(set(orders)) == len(orders)


def test_a_billion_items_without_a_table() -> None:
    count = 10**9
    for epoch in (0, 1, 10**6):
        positions_B = np.arange(epoch * count, epoch * count + 200_000)
        items_B = shuffled_array(3, positions_B, count)
        assert len(np.unique(items_B)) == len(items_B)
        assert stats.kstest(items_B / count, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(items_B[1:], items_B[:-1])[0, 1]) < 0.02


@pytest.mark.parametrize("count", [2, 3, 5, 7, 16, 60, 300])
def test_each_item_lands_at_each_place_equally_often(count: int) -> None:
    epochs = 50 * count
    items_EC = shuffled_array(7, np.arange(epochs * count), count).reshape(epochs, count)
    for place in range(min(count, 6)):
        assert stats.chisquare(np.bincount(items_EC[:, place], minlength=count)).pvalue > 1e-4


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_all_orders_of_a_few_items_are_equally_likely(count: int) -> None:
    orders = int(np.prod(np.arange(1, count + 1)))
    epochs = 300 * orders
    items_EC = shuffled_array(11, np.arange(epochs * count), count).reshape(epochs, count)
    found = Counter(map(tuple, items_EC.tolist()))
    assert len(found) == orders
    assert stats.chisquare(list(found.values())).pvalue > 1e-4


def test_neighbours_land_anywhere_from_each_other() -> None:
    """The distance of two items that follow each other is that of two drawn at random."""
    count = 1000
    items_EC = shuffled_array(5, np.arange(300 * count), count).reshape(300, count)
    distance = (items_EC[:, 1:] - items_EC[:, :-1]) % count
    assert stats.chisquare(np.bincount(distance.ravel(), minlength=count)[1:]).pvalue > 1e-4
    same_place = (items_EC[1:] == items_EC[:-1]).sum()  # in two epochs one after the other
    assert abs(same_place - 299) <= 4 * 299**0.5


def test_mixed_seeds_differ_by_numbers_and_their_order() -> None:
    found = {mixed(*numbers) for numbers in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (1, 0, 0)]}
    assert len(found) == 8
