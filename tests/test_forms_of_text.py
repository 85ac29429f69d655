"""Composed and decomposed text (NFC, NFD) is one text wherever texts are compared, and line ends are one in marks."""

import json
import re
import unicodedata
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from finetune import generate
from finetune.bm25 import search, terms
from finetune.tasks import Source
from finetune.tasks.base import check_label
from kozero.data.cleaning import Cleaner, is_boilerplate
from kozero.data.marks import MARKERS, paragraphs, token_marks
from kozero.errors import UserError
from kozero.metrics import question_answering
from scripts.select_topic import SelectionArguments, topics

nfd = partial(unicodedata.normalize, "NFD")

DOCUMENTS = ["눈이 쌓인 아침에 길을 나섰다", "된장찌개를 끓이고 밥을 지었다", "기차가 바다를 따라 달린다"]


@pytest.mark.parametrize("forms", [(nfd, str), (str, nfd), (nfd, nfd)], ids=["query", "documents", "both"])
def test_a_search_finds_the_same_in_every_form(tmp_path, forms):
    asked, documents = [forms[0]("된장찌개")], [forms[1](text) for text in DOCUMENTS]
    numbers, scores = search(asked, documents, 3, tmp_path, "bigram")
    wanted, theirs = search(["된장찌개"], DOCUMENTS, 3, tmp_path, "bigram")
    assert numbers[0, 0] == wanted[0, 0] == 1
    np.testing.assert_allclose(scores, theirs)


@pytest.mark.slow
def test_morphemes_are_the_same_in_every_form(tmp_path):
    composed, decomposed = terms([DOCUMENTS[1], nfd(DOCUMENTS[1])], "kiwi", tmp_path)
    assert composed == decomposed and "찌개" in "".join(composed)


def syllables(text: str) -> np.ndarray:
    """(T, 2) characters of tokens that are a syllable or another character each, in either form."""
    begins = [k for k, c in enumerate(text) if not re.match("[\u1161-\u11ff\u0301]", c)]
    return np.array(list(pairwise([*begins, len(text)])))


BY_KIWI = ("before_xpn", "after_xpn", "sentence")  # which loads a model


@pytest.mark.parametrize(
    "placement", [pytest.param(name, marks=pytest.mark.slow) if name in BY_KIWI else name for name in MARKERS]
)
def test_pauses_stand_before_and_behind_the_same_syllables_in_every_form(placement):
    text = "헛수고를 했다. 맨손으로 café에서 대청소를 했다.\n풋사과는 시다. 한겨울이다."
    wanted = token_marks(placement, text, syllables(text))
    assert len(wanted) > 1
    for form in (nfd(text), text[:9] + nfd(text[9:])):
        np.testing.assert_array_equal(token_marks(placement, form, syllables(form)), wanted)


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_a_paragraph_begins_behind_every_line_end(end):
    text = "첫 줄\n\n  둘째 줄\n셋째 줄\n"
    wanted = [text[start:stop] for start, stop in paragraphs(text)]
    text = text.replace("\n", end)
    assert [text[start:stop] for start, stop in paragraphs(text)] == wanted == ["첫", "둘", "셋"]


def test_answers_are_compared_in_one_form():
    scores = question_answering([nfd("강감찬"), "강감찬"], [["강감찬"], [nfd("강감찬 장군")]])
    assert scores == {"exact_match": 50.0, "f1": pytest.approx(100 * (1 + 6 / 8) / 2)}


def test_a_group_is_on_one_side_in_every_form():
    source = Source(side="train", validation_fraction=0.5)
    assert all(source.takes(f"전제 {k}") == source.takes(nfd(f"전제 {k}")) for k in range(50))


def test_labels_are_known_in_every_form():
    assert check_label("row 1", nfd("긍정"), ("부정", "긍정")) == 1


def test_topics_and_queries_are_composed_and_one_name_is_one_topic(tmp_path):
    path = tmp_path / "topics.json"
    path.write_text(json.dumps({nfd("음식"): [nfd("된장찌개")]}), encoding="utf-8")
    told = SelectionArguments(files=["x"], topics_file=str(path))
    assert topics(told) == {"음식": ["된장찌개"]}
    path.write_text(json.dumps({nfd("음식"): ["된장찌개"], "음식": ["국"]}), encoding="utf-8")
    with pytest.raises(UserError, match="topic '음식' is there twice"):
        topics(told)


def test_prompts_are_composed(tmp_path):
    (tmp_path / "a.txt").write_text(nfd("긍정") + "\n", encoding="utf-8")
    for told in ({"prompt": nfd("긍정")}, {"prompts_file": str(tmp_path / "a.txt")}):
        assert [text for _, text in generate.prompts_of(generate.GenerationArguments(**told))] == ["긍정"]


def test_a_clean_text_is_composed_and_line_ends_are_not_counted_as_decomposed():
    cleaner = Cleaner(0, 0, 0.0)
    assert cleaner.cleaned("\u1112\u200b\u1161\u00ad\u11ab 글\r\n끝") == "한 글\n끝"
    assert cleaner.counts["not in normal form NFC"] == 1
    cleaner.cleaned("한 글\r\n끝")
    assert cleaner.counts["not in normal form NFC"] == 1


def test_no_text_makes_a_pattern_quadratic():
    """Time would show it, if it were: these take minutes to hours where it grows with the square."""
    for text in ("@." * 10**5, "a@" * 10**5, "www." + "x" * 10**6 + " y", " " * 10**6 + "y"):
        assert not is_boilerplate(text)
    assert list(paragraphs("\n" * 10**5 + " " * 10**5)) == []
