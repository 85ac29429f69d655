"""Batches made in a thread are those that the rows make."""

import threading

import pytest

from kozero.config import BatchSizes
from kozero.data.ahead import Ahead
from kozero.data.batches import TrainingRows
from kozero.pause import Pauses
from tests.helpers import numbered_store

SIZES = BatchSizes(2, 2, 1)


def rows(batching="packed") -> TrainingRows:
    return TrainingRows(numbered_store(30, shortest=3), Pauses(0, 0), 16, batching, seed=0)


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_steps_are_those_of_the_rows_wherever_they_begin(batching):
    made, alone = rows(batching), rows(batching)
    with Ahead(made, SIZES, 0) as ahead:
        for consumed in (0, 4, 8, 40, 44, 0):
            batches, tokens = ahead.step(consumed)
            wanted = alone.step(consumed, SIZES, 0)
            assert [b.inputs["input_ids"].tolist() for b in batches] == [b.inputs["input_ids"].tolist() for b in wanted]
            assert tokens == alone.num_tokens(consumed, SIZES.global_batch)


def test_the_next_step_is_made_before_it_is_asked_for_and_the_thread_ends():
    made, asked = rows(), []
    step, ready = made.step, threading.Event()
    made.step = lambda consumed, *rest: (
        asked.append(consumed) or (consumed == 4 and ready.set()) or step(consumed, *rest)
    )
    with Ahead(made, SIZES, 0) as ahead:
        ahead.step(0)
        assert ready.wait(30)
    assert asked == [0, 4]
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_what_goes_wrong_in_the_thread_is_raised_where_the_step_is_asked_for():
    made = rows()
    step = made.step
    made.step = lambda consumed, *rest: step(consumed, *rest) if consumed < 4 else 1 // 0
    with Ahead(made, SIZES, 0) as ahead:
        ahead.step(0)
        with pytest.raises(ZeroDivisionError):
            ahead.step(4)
