"""Packing, cutting and ordering of rows."""

import numpy as np
import pytest

from kozero.data.rows import epoch_order, fit, grouped_order, pack
from tests.helpers import MemoryStore

CAPACITY = 256


def nsmc_like_lengths(num: int) -> np.ndarray:
    """Many short reviews and a few long ones, about 16 tokens on average."""
    lengths = np.random.default_rng(0).lognormal(2.56, 0.7, num).clip(3, 120).astype(np.int64)
    assert 15 < lengths.mean() < 17
    return lengths


def as_lists(rows) -> list[list[int]]:
    return [row.tolist() for row in rows]


def test_every_example_is_packed_exactly_once():
    lengths = nsmc_like_lengths(10_000)
    rows = pack(lengths, np.arange(10_000), CAPACITY, seed=1)
    assert sorted(np.concatenate(rows)) == list(range(10_000))


def test_only_the_named_examples_are_packed():
    rows = pack(np.full(10, 5), np.array([2, 3, 7]), 10, seed=1)
    assert sorted(np.concatenate(rows)) == [2, 3, 7]


def test_no_row_is_longer_than_its_capacity():
    lengths = nsmc_like_lengths(10_000)
    assert max(lengths[row].sum() for row in pack(lengths, np.arange(10_000), CAPACITY, seed=1)) <= CAPACITY


def test_packing_wastes_less_than_three_percent_on_lengths_like_nsmc():
    lengths = nsmc_like_lengths(20_000)
    rows = pack(lengths, np.arange(20_000), CAPACITY, seed=1)
    assert lengths.sum() / (len(rows) * CAPACITY) > 0.97


def test_packing_is_best_fit_by_hand():
    rows = pack(np.array([6, 5, 4, 3, 2]), np.arange(5), 10, seed=1)
    assert sorted(sorted(row) for row in as_lists(rows)) == [[0, 2], [1, 3, 4]]  # 6 + 4 and 5 + 3 + 2


def test_an_example_as_long_as_a_row_fills_one():
    assert sorted(as_lists(pack(np.array([8, 8]), np.arange(2), 8, seed=1))) == [[0], [1]]


def test_rows_are_as_full_as_those_of_a_plain_search():
    """Which of two rows with equal room takes a text is free, so their sums are compared."""
    rng = np.random.default_rng(4)
    for capacity in (1, 7, 64, 300):
        lengths = np.clip(rng.geometric(3 / (capacity + 2), 1000), 1, capacity)
        sums: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [r for r, used in enumerate(sums) if used + length <= capacity]
            if fitting:
                sums[max(fitting, key=lambda r: sums[r])] += length
            else:
                sums.append(length)
        rows = pack(lengths, np.arange(1000), capacity, seed=1)
        assert sorted(lengths[row].sum() for row in rows) == sorted(sums)


def test_nothing_packs_into_no_rows():
    assert pack(np.array([3, 4]), np.array([], dtype=np.int64), 8, seed=1) == []


def test_packing_depends_on_the_seed_alone():
    lengths = nsmc_like_lengths(5_000)
    first, again, other = (as_lists(pack(lengths, np.arange(5_000), CAPACITY, seed=s)) for s in (1, 1, 2))
    assert first == again
    assert first != other


def one_row(context: int, prompt: int, target: int, span=(-1, -1)) -> MemoryStore:
    return MemoryStore([(range(context), range(prompt), range(target), span)])


def test_what_fits_is_not_cut():
    fitted = fit(one_row(5, 3, 2), capacity=12, num_pauses=2)
    assert fitted.cut.tolist() == [[0, 5]]
    assert fitted.length.tolist() == [12]
    assert (fitted.num_cut, fitted.num_left_out) == (0, 0)


def test_the_cut_is_taken_from_the_context_and_its_head_is_kept():
    fitted = fit(one_row(50, 3, 2), capacity=12, num_pauses=2)
    assert fitted.cut.tolist() == [[0, 5]]  # 12 - 3 - 2 - 2 tokens of it
    assert fitted.length.tolist() == [12]
    assert (fitted.num_cut, fitted.num_left_out) == (1, 0)


@pytest.mark.parametrize("start", range(0, 47))
def test_the_span_survives_the_cut_wherever_it_stands(start):
    fitted = fit(one_row(50, 3, 2, (start, start + 4)), capacity=12, num_pauses=1)
    first, last = fitted.cut[0]
    assert first <= start
    assert start + 4 <= last
    assert first >= 0
    assert last <= 50
    assert last - first == 6


def test_a_moved_cut_has_the_span_in_its_middle_or_ends_with_the_context():
    assert fit(one_row(50, 3, 2, (20, 24)), capacity=12, num_pauses=1).cut.tolist() == [[19, 25]]
    assert fit(one_row(50, 3, 2, (46, 50)), capacity=12, num_pauses=1).cut.tolist() == [[44, 50]]


def test_a_span_in_the_head_does_not_move_the_cut():
    for span in ((1, 5), (2, 6)):  # of the second the last token is the last one kept
        assert fit(one_row(50, 3, 2, span), capacity=12, num_pauses=1).cut.tolist() == [[0, 6]]
    assert fit(one_row(50, 3, 2, (3, 7)), capacity=12, num_pauses=1).cut.tolist() != [[0, 6]]


def test_an_example_whose_span_is_longer_than_the_room_is_left_out():
    whole = fit(one_row(50, 3, 2, (20, 26)), capacity=12, num_pauses=1)
    assert whole.cut.tolist() == [[20, 26]] and whole.used.tolist() == [0]
    fitted = fit(one_row(50, 3, 2, (20, 27)), capacity=12, num_pauses=1)
    assert fitted.used.tolist() == []
    assert fitted.num_left_out == 1


def test_pauses_may_take_all_the_room_of_the_context():
    fitted = fit(one_row(50, 3, 2), capacity=12, num_pauses=7)
    assert fitted.cut[0, 1] - fitted.cut[0, 0] == 0
    assert fitted.used.tolist() == [0]


def test_prompt_pauses_and_target_are_never_cut_the_example_is_left_out_and_counted():
    store = MemoryStore([(range(50), range(3), range(2)), (range(1), range(3), range(2))])
    fitted = fit(store, capacity=12, num_pauses=8)
    assert fitted.used.tolist() == []
    assert (fitted.num_cut, fitted.num_left_out) == (0, 2)


def test_beside_any_number_of_pauses_larger_than_a_row_nothing_fits():
    assert [len(fit(one_row(50, 3, 2), 12, num).used) for num in (7, 8, 13, 2**63, 10**30)] == [1, 0, 0, 0, 0]


def test_each_example_is_judged_by_itself():
    store = MemoryStore([(range(2), range(1), range(1)), (range(90), range(1), range(1)), ([], [], range(20))])
    fitted = fit(store, capacity=10, num_pauses=0)
    assert fitted.length.tolist() == [4, 10, 0]
    assert (fitted.num_cut, fitted.num_left_out) == (1, 1)


@pytest.mark.parametrize("order", [epoch_order, lambda n, s, e: grouped_order(nsmc_like_lengths(n), s, e, 8)])
def test_an_order_is_a_permutation_and_a_pure_function_of_seed_and_epoch(order):
    first = order(1_003, 5, 0)
    assert sorted(first) == list(range(1_003))
    assert (first == order(1_003, 5, 0)).all()
    assert (first != order(1_003, 5, 1)).any()
    assert (first != order(1_003, 6, 0)).any()


def test_grouped_neighbours_have_about_the_same_length():
    lengths = nsmc_like_lengths(8_000)
    groups = lengths[grouped_order(lengths, 5, 0, 16)].reshape(-1, 16)
    mixed = lengths.reshape(-1, 16)
    assert lengths.sum() / (groups.max(axis=1).sum() * 16) > 0.9  # real tokens among all
    assert lengths.sum() / (mixed.max(axis=1).sum() * 16) < 0.5  # where any lengths meet


def test_grouped_batches_do_not_run_from_long_to_short():
    lengths = nsmc_like_lengths(8_000)
    means = lengths[grouped_order(lengths, 5, 0, 16)].reshape(-1, 16).mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


@pytest.mark.parametrize("num", [1, 7, 8, 9])
def test_grouped_order_takes_any_number_of_rows(num):
    assert sorted(grouped_order(np.arange(num), 0, 0, 8)) == list(range(num))
