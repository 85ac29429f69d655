"""Pauses as Goyal et al. (arXiv 2310.02226) define them: appended to the prefix, loss on the target alone."""

import numpy as np
import pytest

from kozero.errors import UserError
from kozero.pause import IGNORE, PauseArguments, Pauses

PAUSE = 7
PREFIX = np.array([11, 12, 13], dtype=np.uint16)
TARGET = np.array([21, 22, 1], dtype=np.uint16)
_ = IGNORE


def test_pauses_stand_between_prefix_and_target():
    ids, _predicts = Pauses(PAUSE, 2).sequence(PREFIX, TARGET)
    assert ids.tolist() == [11, 12, 13, PAUSE, PAUSE, 21, 22, 1]


def test_only_target_tokens_are_predicted_the_first_from_the_last_pause():
    _ids, predicts = Pauses(PAUSE, 2).sequence(PREFIX, TARGET)
    assert predicts.tolist() == [_, _, _, _, 21, 22, 1, _]


def test_without_pauses_the_last_prefix_token_predicts_the_target():
    ids, predicts = Pauses(PAUSE, 0).sequence(PREFIX, TARGET)
    assert ids.tolist() == [11, 12, 13, 21, 22, 1]
    assert predicts.tolist() == [_, _, 21, 22, 1, _]


def test_pauses_without_a_prefix_come_first():
    ids, predicts = Pauses(PAUSE, 2).sequence(PREFIX[:0], TARGET)
    assert ids.tolist() == [PAUSE, PAUSE, 21, 22, 1]
    assert predicts.tolist() == [_, 21, 22, 1, _]


def test_without_prefix_and_pauses_nothing_predicts_the_first_target_token():
    ids, predicts = Pauses(PAUSE, 0).sequence(PREFIX[:0], TARGET)
    assert ids.tolist() == [21, 22, 1]
    assert predicts.tolist() == [22, 1, _]


@pytest.mark.parametrize("num", [0, 1, 10])
def test_a_pause_is_never_predicted(num):
    _ids, predicts = Pauses(PAUSE, num).sequence(PREFIX, TARGET)
    assert PAUSE not in predicts
    assert (predicts != IGNORE).sum() == len(TARGET)


@pytest.mark.parametrize("num", [0, 1, 10])
def test_what_predicts_is_always_the_token_before(num):
    ids, predicts = Pauses(PAUSE, num).sequence(PREFIX, TARGET)
    places = np.flatnonzero(predicts != IGNORE)
    assert (predicts[places] == ids[places + 1]).all()


@pytest.mark.parametrize("num", [0, 1, 10])
def test_the_prompt_at_inference_is_the_head_of_the_training_sequence(num):
    pauses = Pauses(PAUSE, num)
    ids, _predicts = pauses.sequence(PREFIX, TARGET)
    assert pauses.prompt(PREFIX).tolist() == ids[: len(PREFIX) + num].tolist()


def test_a_pause_id_above_sixteen_bit_is_kept_for_wide_ids():
    ids, _predicts = Pauses(70_000, 1).sequence(PREFIX.astype(np.int64), TARGET.astype(np.int64))
    assert 70_000 in ids


def test_inference_takes_as_many_pauses_as_training_unless_told_otherwise():
    assert PauseArguments(num_pauses=10).at_inference == 10
    assert PauseArguments(num_pauses=10, num_inference_pauses=5).at_inference == 5
    assert PauseArguments(num_pauses=10, num_inference_pauses=0).at_inference == 0


@pytest.mark.parametrize(("name", "value"), [("num_pauses", -1), ("num_inference_pauses", -2)])
def test_a_negative_number_of_pauses_is_refused_by_name_and_value(name, value):
    with pytest.raises(
        UserError, match=f"^--{name} {value}: must be {-1 if name == 'num_inference_pauses' else 0} or more$"
    ):
        PauseArguments(**{name: value})
