"""The order of rows that is held nowhere."""

import numpy as np
import pytest

from kozero.data.order import GROUPS, Order, permute


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


def order(num: int = 400, group: int = 2, seed: int = 3) -> Order:
    """Rows whose lengths are their numbers, four windows of GROUPS groups an epoch."""
    return Order(num, num, group, seed, lengths=lambda numbers: numbers)


def windows_of(rows: Order, epoch: int) -> list[list[int]]:
    """The rows of each window of an epoch, in their order."""
    size, start = GROUPS * rows.group, epoch * rows.epoch_rows
    return [[rows[start + k] for k in range(w, w + size)] for w in range(0, rows.epoch_rows, size)]


def test_an_epoch_holds_every_row_once_and_each_window_others_in_every_epoch():
    rows = order()
    epochs = [windows_of(rows, epoch) for epoch in (0, 1)]
    assert all(sorted(row for window in windows for row in window) == list(range(400)) for windows in epochs)
    assert all(set(first) != set(second) for first, second in zip(*epochs, strict=True))


def test_rows_of_a_group_have_about_the_same_length():
    """Neighbours among 100 of 400 sorted numbers lie 4 apart on average, two random ones 133."""
    spread = [abs(a - b) for window in windows_of(order(), 0) for a, b in zip(window[::2], window[1::2], strict=True)]
    assert np.mean(spread) < 8


def test_groups_of_a_window_change_places_otherwise_in_each_window_and_epoch():
    rows = order()
    ranks = [tuple(np.argsort(window[::2]).tolist()) for epoch in (0, 1) for window in windows_of(rows, epoch)]
    assert len(set(ranks)) == len(ranks) == 8


def test_an_epoch_may_take_a_part_of_the_rows_and_ends_with_a_group_that_is_not_whole():
    rows = Order(1000, 105, 4, 3, lengths=lambda numbers: numbers)
    taken = [rows[k] for k in range(105)]
    assert len(set(taken)) == 105 and max(taken) < 1000
    assert [rows[k] for k in range(105, 210)] != taken
