"""The order of rows that is held nowhere."""

import numpy as np
import pytest

from kozero.data.order import permute


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 16, 17, 1000, 65537])
def test_every_number_comes_once(num):
    assert sorted(permute(np.arange(num), num, (1, 2)).tolist()) == list(range(num))


def test_a_place_has_its_number_whoever_else_asks():
    whole = permute(np.arange(1000), 1000, (3, 0))
    some = np.array([999, 0, 500])
    assert permute(some, 1000, (3, 0)).tolist() == whole[some].tolist()


def test_seed_and_epoch_each_make_another_order():
    orders = [tuple(permute(np.arange(50), 50, key).tolist()) for key in ((1, 0), (1, 1), (2, 0), (0, 1))]
    assert len(set(orders)) == 4


def test_numbers_stay_exact_far_beyond_memory():
    num = 10**15 + 7
    values = permute(np.arange(2000), num, (5, 1))
    assert len(set(values.tolist())) == 2000 and values.min() >= 0 and values.max() < num


def test_where_a_number_lands_is_uniform():
    """Chi-square over 20 x 20 cells of (place, number): about 361 degrees of freedom, sigma about 27."""
    num = 4000
    table = np.zeros((20, 20))
    for epoch in range(25):
        np.add.at(table, (np.arange(num) * 20 // num, permute(np.arange(num), num, (7, epoch)) * 20 // num), 1)
    expected = num * 25 / 400
    assert abs(((table - expected) ** 2 / expected).sum() - 361) < 5 * 27


@pytest.mark.parametrize("num", [2, 5])
def test_few_numbers_are_shuffled_evenly_too(num):
    """Each lands at each place in 1 / num of 2,000 orders: 4.5 sigma."""
    counts = np.zeros((num, num))
    for epoch in range(2000):
        counts[np.arange(num), permute(np.arange(num), num, (3, epoch))] += 1
    assert np.abs(counts / 2000 - 1 / num).max() < 4.5 * (1 / num * (1 - 1 / num) / 2000) ** 0.5


def test_neighbours_do_not_stay_neighbours():
    values = permute(np.arange(10_000), 10_000, (9, 9))
    assert (np.abs(np.diff(values)) == 1).mean() < 0.002
