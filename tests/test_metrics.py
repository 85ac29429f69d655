"""KorQuAD scores and classification scores against numbers worked by hand."""

import numpy as np
import pytest

from kozero.metrics import (
    character_f1,
    classification,
    exact_match,
    normalize_answer,
    perplexity,
    question_answering,
    retrieval,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("《훈민정음》", "훈민정음"),
        ("〈왕의 남자〉", "왕의 남자"),
        ("<기생충>", "기생충"),
        ("서울(수도)", "서울 수도"),  # a mark leaves a space ...
        ("가-나", "가나"),  # ... other ASCII punctuation leaves nothing
        ("don't", "don t"),  # the apostrophe is both: the mark comes first
        ('"인용"', "인용"),
        ("‘세종’의", "세종 의"),
        ("1,000.5%", "10005"),
        ("BTS", "bts"),
        ("  서울   특별시\t", "서울 특별시"),
        ("“책”", "“책”"),  # typographic double quotes are not on the list
        ("가·나！", "가·나！"),  # nor is punctuation outside ASCII
        ("...", ""),
    ],
)
def test_answers_are_normalised_by_the_official_rules(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match_ignores_marks_case_and_punctuation_but_not_spaces():
    assert exact_match("《bts》.", "BTS") == 1.0
    assert exact_match("대한 민국", "대한민국") == 0.0
    assert exact_match("서울시", "서울") == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer", "f1"),
    [
        ("서울", "서울", 1.0),
        ("서울시", "서울", 0.8),  # precision 2/3, recall 1
        ("서울", "서울특별시", 4 / 7),  # precision 1, recall 2/5
        ("가가나", "가나나", 2 / 3),  # bags: one 가 and one 나 in common
        ("울서", "서울", 1.0),  # order does not count
        ("대한 민국", "대한민국", 1.0),  # nor do spaces
        ("《서울》", "서울", 1.0),
        ("부산", "서울", 0.0),
        ("", "서울", 0.0),
        ("...", "...", 0.0),  # as the official script: nothing in common
    ],
)
def test_character_f1_compares_bags_of_characters(prediction, answer, f1):
    assert character_f1(prediction, answer) == pytest.approx(f1)


def test_a_question_scores_its_best_answer_and_the_mean_is_in_percent():
    scores = question_answering(["서울시", "1392년"], [["부산", "서울"], ["1392년", "태조"]])
    assert scores == pytest.approx({"exact_match": 50.0, "f1": 90.0})


def test_predictions_and_answers_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        question_answering(["서울"], [["서울"], ["부산"]])


def test_classification_by_hand():
    scores = classification([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2], ("함의", "중립", "모순"))
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)


def test_a_class_that_is_neither_wanted_nor_predicted_counts_0_in_macro_f1():
    """As scikit-learn's f1_score with all labels and zero_division=0."""
    scores = classification([0, 1, 1], [0, 1, 0], ("함의", "중립", "모순"))
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert scores["predicted_모순"] == 0.0 and scores["majority"] == pytest.approx(2 / 3)


def test_predicted_shares_show_a_model_that_says_one_thing():
    scores = classification([0, 0, 0, 0], [0, 0, 1, 1], ("부정", "긍정"))
    assert scores["predicted_부정"] == 1.0
    assert scores["predicted_긍정"] == 0.0
    assert scores["accuracy"] == 0.5
    assert scores["macro_f1"] == pytest.approx(1 / 3)


def test_an_example_without_prediction_counts_as_wrong():
    scores = classification([-1, 1], [0, 1], ("부정", "긍정"))
    assert scores["accuracy"] == 0.5
    assert scores["macro_f1"] == pytest.approx(0.5)
    assert scores["predicted_부정"] + scores["predicted_긍정"] == 0.5


def test_of_nothing_there_is_no_score():
    """A zero would be one, and of a loss the best there is."""
    assert classification([], [], ("부정", "긍정")) == question_answering([], []) == perplexity([], [], []) == {}
    assert retrieval(np.zeros((0, 5), dtype=int), np.zeros(0, dtype=int)) == {}
