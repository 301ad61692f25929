"""The order of items is shuffled without a table, and sources are mixed by the paper's rule."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cm3leon.data.mixture import Mixture, sampling_rates
from cm3leon.data.shuffle import shuffled, shuffled_array
from cm3leon.seeds import mixed
from cm3leon.types import UserError

seeds = st.integers(0, 2**63)


def order(seed: int, count: int, epoch: int) -> list[int]:
    """The items of one epoch, in the order in which they are read."""
    return shuffled_array(seed, np.arange(epoch * count, (epoch + 1) * count), count).tolist()


# -------------------------------------------------------------------------------------------- order


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
    """Two items that follow each other are as far apart as two items drawn at random."""
    count = 1000
    items_EC = shuffled_array(5, np.arange(300 * count), count).reshape(300, count)
    distance = (items_EC[:, 1:] - items_EC[:, :-1]) % count
    assert stats.chisquare(np.bincount(distance.ravel(), minlength=count)[1:]).pvalue > 1e-4

    # From one epoch to the next, an item keeps its place as often as chance has it: once in 1000.
    same_place = (items_EC[1:] == items_EC[:-1]).sum()
    assert abs(same_place - 299) <= 4 * 299**0.5


def test_mixed_seeds_differ_by_numbers_and_their_order() -> None:
    every = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (1, 0, 0)]
    found = {mixed(*numbers) for numbers in every}
    assert len(found) == 8


# ------------------------------------------------------------------------------------------ mixture


def test_rates_by_the_papers_rule() -> None:
    assert sampling_rates([100, 900], None) == [1.0, 1.0]
    assert sampling_rates([100, 900], [100, 900]) == [1.0, 1.0]

    # Equal shares would need the small source five times; it is repeated at most three times.
    assert sampling_rates([100, 900], [1, 1]) == pytest.approx([3.0, 500 / 900])
    # Here it would be nine times, and 0.11 times for the large one.
    assert sampling_rates([100, 900], [0.9, 0.1]) == pytest.approx([3.0, 0.3])
    assert sampling_rates([100, 900], [1, 1], most=6.0, least=0.6) == pytest.approx([5.0, 0.6])
    assert sampling_rates([50, 50, 100], [2, 1, 1]) == pytest.approx([2.0, 1.0, 0.5])


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.01, 100)), min_size=1, max_size=6),
    st.floats(1, 10),
    st.floats(0, 1),
)
def test_rates_are_within_bounds_and_give_the_shares_where_those_allow(
    drawn: list[tuple[int, float]], most: float, least: float
) -> None:
    counts, shares = zip(*drawn, strict=True)
    rates = sampling_rates(counts, shares, most, least)

    assert all(least <= rate <= most for rate in rates)
    for count, share, rate in zip(counts, shares, rates, strict=True):
        # The number of this source's documents in an epoch if nothing limited its rate.
        wanted = share / sum(shares) * sum(counts)
        if rate in (least, most):
            assert wanted <= least * count * (1 + 1e-9) or wanted >= most * count * (1 - 1e-9)
        else:
            assert rate * count == pytest.approx(wanted)


def test_mistakes_are_one_sentence() -> None:
    for shares in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(UserError, match="must be 2 numbers >= 0, not all of them 0"):
            sampling_rates([3, 4], shares)
    with pytest.raises(UserError, match="source 1 of the mixture is empty; leave it out"):
        sampling_rates([3, 0], [1, 1])
    for counts in ([], [0, 0], [1]):
        with pytest.raises(UserError, match="an epoch of the mixture is empty"):
            Mixture(counts, [0.3] * len(counts), 0)


mixtures = st.lists(
    st.tuples(st.integers(1, 30), st.floats(0.3, 3.0)), min_size=1, max_size=4
).filter(lambda sources: sum(round(count * rate) for count, rate in sources) > 0)


@given(mixtures, seeds, st.integers(1, 4))
@settings(max_examples=60)
def test_mixture_against_brute_force(
    sources: list[tuple[int, float]], seed: int, epochs: int
) -> None:
    counts, rates = [list(column) for column in zip(*sources, strict=True)]
    mixture = Mixture(counts, rates, seed)

    # Every epoch holds exactly as many places of each source as its rate says.
    places = [round(count * rate) for count, rate in sources]
    assert len(mixture) == sum(places)
    found = [mixture.at(position) for position in range(epochs * len(mixture))]
    for epoch in range(epochs):
        of_epoch = found[epoch * len(mixture) : (epoch + 1) * len(mixture)]
        shares = Counter(source for source, _, _ in of_epoch)
        assert [shares[number] for number in range(len(counts))] == places

    for number, count in enumerate(counts):
        # Over all epochs, how often two rows were read differs by one at most.
        drawn = Counter(row for source, row, _ in found if source == number)
        whole, more = divmod(epochs * places[number], count)
        assert (
            sorted(drawn[row] for row in range(count))
            == [whole] * (count - more) + [whole + 1] * more
        )

        # A pass through the source's rows is finished before the next one begins.
        passes = Counter((row, epoch) for source, row, epoch in found if source == number)
        assert set(passes.values()) <= {1}
        assert set(passes) >= {(row, epoch) for row in range(count) for epoch in range(whole)}
        assert all(0 <= row < count and epoch <= whole for row, epoch in passes)


def test_each_source_has_an_order_of_its_own() -> None:
    """The k-th place of a source holds its k-th row in the order of that source's seed."""
    mixture = Mixture([40, 40], [1.0, 1.5], 9)
    orders: list[list[int]] = [[], []]

    for epoch in range(3):
        positions = range(epoch * len(mixture), (epoch + 1) * len(mixture))
        for position in sorted(positions, key=lambda position: shuffled(9, position, len(mixture))):
            source, row, _ = mixture.at(position)
            orders[source].append(row)

    assert orders[0] == [shuffled(mixed(9, 0), k, 40) for k in range(120)]
    assert orders[1] == [shuffled(mixed(9, 1), k, 40) for k in range(180)]
    assert orders[0] != orders[1][:120]


def columns(mixture: Mixture, positions: range) -> list[np.ndarray]:
    """Sources, rows and epochs of the positions."""
    return list(np.array([mixture.at(position) for position in positions]).T)


def test_sources_are_spread_evenly_through_an_epoch() -> None:
    mixture = Mixture([3000, 500, 10], [1.0, 3.0, 2.0], 4)
    sources_B, rows_B, _ = columns(mixture, range(len(mixture)))
    for source in range(3):
        positions = np.flatnonzero(sources_B == source)
        assert stats.kstest(positions / len(mixture), "uniform").pvalue > 1e-4

    # The rows of a source come in a shuffled order, and another seed mixes the sources otherwise.
    assert stats.kstest(rows_B[sources_B == 0][:300] / 3000, "uniform").pvalue > 1e-4
    again = columns(Mixture([3000, 500, 10], [1.0, 3.0, 2.0], 5), range(len(mixture)))
    assert (again[0] != sources_B).mean() > 0.3


def test_a_mixture_of_340_million() -> None:
    mixture = Mixture([340_000_000, 2_000_000], [1.0, 3.0], 0)
    sources_B, rows_B, epochs_B = columns(mixture, range(10**12, 10**12 + 20_000))
    # The second source has 6 of 346 million places, for its 2 million rows are read three times.
    assert abs(sources_B.mean() - 6 / 346) < 0.004
    assert rows_B.max() < 340_000_000
    assert set(epochs_B[sources_B == 0]) == {10**12 // len(mixture)}
