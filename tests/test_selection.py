"""scripts/select_topic.py and what it is made of: cleaning, duplicates, search, split."""

import json
import os
import shlex
import sys
import unicodedata
from collections import Counter

import bm25s
import numpy as np
import pytest

from finetune.bm25 import bigrams, search, terms
from kozero.data.cleaning import Cleaner
from kozero.data.documents import Pool, documents
from kozero.data.duplicates import NUM_HASHES, duplicates, rows_of_a_band, shingles
from kozero.errors import UserError
from scripts import select_topic
from scripts.select_topic import Sides, draw, fused, next_command
from tests.helpers import SAMPLE_DATA
from tests.test_commands import commands, shell

# Cleaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, clean",
    [
        (unicodedata.normalize("NFD", "한글은 좋다"), "한글은 좋다"),
        ("영\u200b폭\ufeff이 \u00ad없는\x07 글", "영폭이 없는 글"),
        ("첫째  줄\t끝 \r\n\r\n\r\n 둘째\r셋째", "첫째 줄 끝\n\n둘째\n셋째"),
        ("기사 본문\nⓒ 신문사, 무단 전재 및 재배포 금지\n이어짐", "기사 본문\n이어짐"),
        ("본문\n공유하기\nhttps://example.org/a\n기자@example.org\n더 보기", "본문"),
        ("저작권을 말하는 글이다. www 이야기", "저작권을 말하는 글이다. www 이야기"),
        ("깨진 \ufffd 글자", "깨진 \ufffd 글자"),
        (" ".join(["저작권자를 다루는 문단이다."] * 9), " ".join(["저작권자를 다루는 문단이다."] * 9)),
        ("한 줄\x0c다음 줄\u2028셋째 줄\x85넷째", "한 줄\n다음 줄\n셋째 줄\n넷째"),
        ("반쪽 \ud800글자", "반쪽 글자"),
    ],
)
def test_what_is_no_text_goes_and_the_text_stays(text, clean):
    assert Cleaner(0, 0, 0.0).cleaned(text) == clean


NOTES = [
    "<저작권자(c) 연합뉴스, 무단 전재-재배포 금지>", "저작권자 ⓒ 한겨레. 무단전재 및 재배포를 금지합니다.",
    "[ⓒ 매일경제 & mk.co.kr, 무단전재 및 재배포 금지]", "Copyright ⓒ 2020 신문사. All rights reserved.",
    "Copyrights 2019 출판사", "© 2024 홍길동", "(c) 2019 출판사", "사진 ⓒ 연합뉴스", "저작권자: 홍길동",
    "무단전재 및 재배포 금지", "본 기사의 무단 전재 및 재배포를 금지합니다.", "연합뉴스, 무단 복제 금지",
]  # fmt: skip
SENTENCES = [
    "저작권자는 누구인가?", "저작권자의 허락을 받았다.", "저작권자", "무단 전재를 금지하는 법이 생겼다.",
    "정부는 무단 복제를 금지합니다.", "ⓒ는 저작권을 나타내는 기호다.", "ⓒ 표시가 없는 글도 보호를 받는다.",
    "copyright라는 말은 영어다", "책 끝에는 All rights reserved라고 적혀 있다.", "재배포 금지라는 말이 붙어 있었다.",
    "그는 저작권자이자 발행인이었다", "a@b@c.kr에 @ 표가 둘 있다", "ⓒⓞⓞⓛ",
]  # fmt: skip


@pytest.mark.parametrize("line", [*NOTES, *SENTENCES])
def test_notes_of_rights_go_and_sentences_about_rights_stay(line):
    kept = Cleaner(0, 0, 0.0).cleaned(f"앞 문단이다.\n{line}\n뒤 문단이다.").split("\n")
    assert kept == ["앞 문단이다.", *([line] if line in SENTENCES else []), "뒤 문단이다."]


def test_a_note_of_rights_is_a_line_of_80_characters_at_most():
    note = " All rights reserved."
    for length, goes in ((80, True), (81, False)):
        line = "글" * (length - len(note)) + note
        assert (line not in Cleaner(0, 0, 0.0).cleaned(f"앞\n{line}\n뒤")) == goes


@pytest.mark.parametrize(
    "text, reason",
    [
        ("짧다", "below 5 characters"),
        ("길" * 41, "above 40 characters"),
        ("mostly english 한글", "below 50% Hangul"),
        ("깨진 \ufffd 글자입니다", "broken encoding"),
        ("한글 셋 abc 반", ""),
        ("1234567 !!", "below 50% Hangul"),
    ],
)
def test_what_is_left_out_is_counted_by_its_reason(text, reason):
    cleaner = Cleaner(5, 40, 0.5)
    found = list(cleaner.texts([("here", {"text": text})]))
    assert found == ([] if reason else [("here", text)])
    assert cleaner.counts["documents read"] == 1
    assert cleaner.counts[f"left out: {reason}"] == bool(reason)


# Documents -------------------------------------------------------------------------------------------------------


def test_documents_of_all_kinds_of_files(tmp_path):
    counts = Counter()
    (tmp_path / "a.txt").write_bytes(
        "\ufeff하나\n둘\n\n\n셋\n".encode() + "넷 똠방".encode("cp949") + b"\n\xff\xfe\x80\n"
    )
    (tmp_path / "b.jsonl").write_text('{"text": "다섯"}\n{"body": 1}\nnot json\n{"text": " 여섯 "}\n', encoding="utf-8")
    korquad = {"data": [{"paragraphs": [{"context": "일곱"}, {"context": "여덟"}]}, {"title": "비었다"}]}
    (tmp_path / "c.json").write_text(json.dumps(korquad), encoding="utf-8")
    read = {name: list(documents(tmp_path / name, "document", counts)) for name in ("a.txt", "b.jsonl", "c.json")}
    texts = {name: [row["text"] for _, row in found] for name, found in read.items()}
    assert texts["a.txt"] == ["하나\n둘", "셋\n넷 똠방\n\ufffd\ufffd\ufffd"]
    assert [where for where, _ in read["a.txt"]] == [f"{tmp_path}/a.txt:1", f"{tmp_path}/a.txt:5"]
    assert texts["b.jsonl"] == ["다섯", "여섯"] and texts["c.json"] == ["일곱", "여덟"]
    assert counts == {
        "lines in CP949": 1,
        "lines in no known encoding": 1,
        "rows without a text": 2,
        "articles without paragraphs": 1,
    }
    lines = [row["text"] for _, row in documents(tmp_path / "a.txt", "line", Counter())]
    assert lines[:3] == ["하나", "둘", "셋"]


def test_a_pool_reads_by_number_and_in_turn(tmp_path):
    pool = Pool(tmp_path / "pool", iter([("a", "하나\n둘"), ("b", "셋"), ("c", "넷")]))
    assert list(pool) == ["하나\n둘", "셋", "넷"] and pool[1] == ("b", "셋")
    pool.keep(np.array([0, 2]))
    assert len(pool) == 2 and list(pool) == ["하나\n둘", "넷"] and pool[1] == ("c", "넷")


# Duplicates ------------------------------------------------------------------------------------------------------


def test_bands_miss_at_most_one_pair_in_a_hundred():
    """By hand: 21 bands of 6 rows at 0.8 miss (1 - 0.262)^21 = 0.0017; 18 bands of 7 miss 0.0146."""
    assert rows_of_a_band(0.8) == 6 and rows_of_a_band(1.0) == NUM_HASHES
    assert (1 - 0.8**7) ** (NUM_HASHES // 7) > 0.01


def test_duplicates_are_those_of_the_exact_jaccard_index(tmp_path):
    """Pairs well above the border are found, pairs well below it are not; the first of its kind stays."""
    rng = np.random.default_rng(0)
    syllables = [chr(c) for c in range(ord("가"), ord("가") + 800)]
    texts = ["".join(rng.choice(syllables, 150)) for _ in range(40)]
    changed = []
    for k, text in enumerate(texts):
        num = k % 12  # this many syllables are others
        letters = list(text)
        for place in rng.choice(150, num, replace=False):
            letters[place] = "힣"
        changed.append("".join(letters))
    found = duplicates(texts + changed, 0.7, tmp_path)
    assert (found[:40] == -1).all()
    for k, text in enumerate(texts):
        one, other = shingles(text), shingles(changed[k])
        jaccard = len(one & other) / len(one | other)
        if abs(jaccard - 0.7) > 0.12:  # three standard errors of 128 hashes
            assert (found[40 + k] == k) == (jaccard > 0.7), jaccard
    assert len({bool(value) for value in found[40:] == -1}) == 2, "both sides of the border were tried"


def test_marks_spaces_and_case_make_no_other_text(tmp_path):
    texts = [
        "정말 재미있는 영화였다",
        "다른 글입니다 정말로",
        "정말재미있는~ 영화였다!!",
        "짧",
        "짧!",
        "Is It So",
        "is it so?",
    ]
    assert duplicates(texts, 0.8, tmp_path).tolist() == [-1, -1, 0, -1, 3, -1, 5]
    assert duplicates(texts, 1.0, tmp_path).tolist() == [-1, -1, 0, -1, 3, -1, 5]
    assert duplicates([], 0.8, tmp_path).tolist() == []


def test_shingles_by_hand():
    assert shingles("영화가 정말, 좋다") == {text.encode() for text in ("영화가정말", "화가정말좋", "가정말좋다")}
    assert shingles("다섯글자야") == {"다섯글자야".encode()} and shingles("짧다") == {"짧다".encode()}


# Search ----------------------------------------------------------------------------------------------------------


def test_bigrams_by_hand():
    assert bigrams("영화가 참, BEST 1위!") == ["영화", "화가", "참", "best", "1", "위"]


@pytest.mark.parametrize("analyzer", ["bigram", "kiwi"])
def test_scores_are_those_of_an_index_over_all_terms(tmp_path, analyzer):
    texts = (SAMPLE_DATA / "corpus/corpus.txt").read_text(encoding="utf-8").split("\n")
    texts = [text for text in texts if text][:300]
    asked = ["눈이 쌓인 골목", "된장찌개를 끓이는 방법", "없는말뿐임 zzz"]
    found, scores = search(asked, texts, 20, tmp_path, analyzer)
    index = bm25s.BM25()
    index.index(list(terms(texts, analyzer, tmp_path)), show_progress=False)
    wanted, theirs = index.retrieve(list(terms(asked, analyzer, tmp_path)), k=20, show_progress=False)
    np.testing.assert_allclose(scores, theirs, rtol=1e-6)
    for ours, other, values in zip(found, wanted, scores, strict=True):
        clear = np.flatnonzero(values > values.min() + 1e-6)  # of equal scores either may come first
        assert {*ours[clear].tolist()} == {*other[clear].tolist()}


def test_rankings_are_fused_by_reciprocal_ranks():
    """Cormack, Clarke, Buettcher (2009) with k = 60; what has no score was not found."""
    numbers, scores = np.array([[4, 7, 9], [7, 5, 4]]), np.array([[3.0, 2.0, 0.0], [1.0, 0.5, 0.0]])
    assert fused(numbers, scores) == [
        (7, pytest.approx(1 / 62 + 1 / 61)), (4, pytest.approx(1 / 61)), (5, pytest.approx(1 / 62)),
    ]  # fmt: skip


@pytest.mark.slow
def test_readme_commands_from_topic_to_text_run_one_after_the_other(tmp_path):
    block = [c for c in commands("README.md") if "select_topic" in c or "essay" in c or "runs/writer" in c]
    assert len(block) == 3
    for command in block:
        command = command.replace("runs/", f"{tmp_path}/runs/")
        command += " --max_steps 2" if "train.py" in command else ""
        command += " --max_new_tokens 16" if "generate" in command else ""
        done = shell(command)
        assert done.returncode == 0, command + done.stdout + done.stderr
    rows = rows_of(tmp_path / "runs/writer/texts.jsonl")
    assert len(rows) == 2 and rows[0]["settings"]["repetition_penalty"] == 2.0
    assert "self_bleu" in (tmp_path / "runs/writer/texts.metrics.json").read_text(encoding="utf-8")


# The whole -------------------------------------------------------------------------------------------------------


def select(monkeypatch, folder, *flags) -> dict:
    argv = ["select_topic.py", "--cache_dir", str(folder / "cache"), *map(str, flags)]
    monkeypatch.setattr(sys, "argv", argv)
    select_topic.main()


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_selection_is_split_by_document_and_random_text_is_as_much(monkeypatch, tmp_path, capsys):
    topics = {"음식": ["된장찌개 국수 요리", "맛있는 음식"], "날씨": ["눈이 쌓인 아침", "비가 오는 날"]}
    (tmp_path / "topics.json").write_text(json.dumps(topics), encoding="utf-8")
    shared = ("--topics_file", tmp_path / "topics.json", "--files", SAMPLE_DATA / "corpus", "--top_k", 30)
    shared += ("--validation_fraction", 0.3, "--terms", "bigram")
    select(monkeypatch, tmp_path, *shared, "--output_dir", tmp_path / "out")
    told = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert told["counts"]["documents read"] == 173 and told["peak_memory_mib"] > 0
    sides = {
        (topic, side): rows_of(tmp_path / "out" / topic / f"{side}.jsonl")
        for topic in topics for side in ("train", "validation", "random")
    }  # fmt: skip
    held_out = {row["text"] for (_, side), rows in sides.items() for row in rows if side == "validation"}
    others = {row["text"] for (_, side), rows in sides.items() for row in rows if side != "validation"}
    assert held_out and not held_out & others, "nothing that validates is trained on, by any topic"
    for topic in topics:
        train, random = sides[topic, "train"], sides[topic, "random"]
        assert 20 < len(train) + len(sides[topic, "validation"]) <= 30
        assert not {row["text"] for row in train} & {row["text"] for row in random}
        assert min(draw(row["text"]) for row in random) >= 0.3, "another topic may validate on it"
        sizes = [sum(len(row["text"]) for row in rows) for rows in (train, random)]
        assert sizes[0] <= sizes[1] < sizes[0] + max(len(row["text"]) for row in random)
        assert [row["score"] for row in train] == sorted((row["score"] for row in train), reverse=True)
        assert told["topics"][topic]["train"]["documents"] == len(train)
    assert "국수" in sides["음식", "train"][0]["text"] + sides["음식", "validation"][0]["text"]
    summary = (tmp_path / "out/summary.md").read_text(encoding="utf-8")
    assert "## 음식" in summary and "| train |" in summary
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*topics, "report.json", "summary.md"}
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: python finetune/train.py --task essay")
    select(monkeypatch, tmp_path, *shared, "--output_dir", tmp_path / "again")
    for path in (tmp_path / "out").rglob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes()


def test_the_side_of_a_document_is_a_function_of_its_text():
    texts = [f"글 {k}" for k in range(4000)]
    quarter, half = Sides(0.25, []), Sides(0.5, [])
    share = sum(quarter.validates(text) for text in texts) / len(texts)
    assert 0.22 < share < 0.28  # 4 standard deviations
    assert all(half.validates(text) for text in texts if quarter.validates(text)), "more validates what did before"


def test_every_topic_has_something_that_validates_and_no_other_loses_more_than_its_share():
    small = [[f"글 {k}" for k in range(start, start + 5)] for start in (0, 10, 20)]
    large = [f"큰 글 {k}" for k in range(1000)]
    sides = Sides(0.01, [*small, ["하나"], large])
    for texts in small:
        validating = [text for text in texts if sides.validates(text)]
        assert validating == [text for text in texts if draw(text) < 0.01] or validating == [min(texts, key=draw)]
        assert validating
    assert not sides.validates("하나"), "a topic of one document learns from it"
    assert sum(map(sides.validates, large)) == sum(draw(text) < 0.01 for text in large)
    assert not Sides(0.0, []).validates(min(large, key=draw))


def test_the_next_command_can_be_pasted_and_names_what_is_there(tmp_path):
    told = {"빈": {"train": {"documents": 0}}, "여행 글": {"train": {"documents": 3}, "validation": {"documents": 0}}}
    words = shlex.split(next_command(tmp_path, told))
    assert words[-1] == str(tmp_path / "여행 글" / "train.jsonl") and "--validation_file" not in words


def test_a_topic_that_finds_nothing_is_named(monkeypatch, tmp_path, capsys):
    """And when none finds anything, nothing is left."""
    (tmp_path / "t.json").write_text(json.dumps({"눈": ["눈이 쌓인 아침"], "없음": ["쀍쀍 뛟뛟"]}), encoding="utf-8")
    shared = ("--files", SAMPLE_DATA / "corpus", "--terms", "bigram")
    select(monkeypatch, tmp_path, *shared, "--topics_file", tmp_path / "t.json", "--output_dir", tmp_path / "one")
    assert "topic 없음: no document has a word of its queries" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"no document has a word of any query; write other queries$"
    ):  # terms are given
        select(monkeypatch, tmp_path, *shared, "--query", "쀍쀍", "--output_dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_table_in_nsmcs_form_gives_its_reviews_without_ids_and_labels(tmp_path):
    path = tmp_path / "ratings.txt"
    path.write_text("id\tdocument\tlabel\n1\t참 좋은 영화\t1\n2\t나쁘다\t0\n3\tx\n", encoding="utf-8")
    counts = Counter()
    assert [row["text"] for _, row in documents(path, "line", counts)] == ["참 좋은 영화", "나쁘다"]
    assert counts["rows without a text"] == 1


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "글이다".encode("utf-16"), "a.txt: not UTF-8; if it is UTF-16"),
        ("a.pdf", b"%PDF", "a.pdf: not one of .txt"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(documents(tmp_path / name, "line", Counter()))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--query", "눈"], "--files: name at least one"),
        (["--files", "."], "--query and --topics_file: give one"),
        (["--files", ".", "--query", "눈", "--topic", "../눈"], "--query: topic '../눈' names a folder"),
        (["--files", ".", "--query", "눈", "--topic", "가" * 61], "use at most 60 letters"),
        (["--files", ".", "--query", "눈", "--topic", "report.json"], "topic 'report.json' names a folder"),
        (["--files", ".", "--query", "눈", "--top_k", "0"], "--top_k 0"),
        (["--files", ".", "--query", "눈", "--similarity", "0"], "--similarity 0.0"),
        (["--files", "nowhere", "--query", "눈"], "--files nowhere: no such file"),
        (
            ["--files", ".", "--query", "눈", os.fsdecode("눈".encode("cp949"))],
            r"--query '\\udcb4\\udcab': is not UTF-8",
        ),
        (["--files", ".", "--query", " "], "must be a list of queries"),
    ],
)
def test_a_mistake_is_named(monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        select(monkeypatch, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_written_to(monkeypatch, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work and many words")
    with pytest.raises(UserError, match="holds something already"):
        select(monkeypatch, tmp_path, "--files", tmp_path, "--query", "눈", "--output_dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_nothing_that_stays_is_told_with_the_reasons(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("short\n")
    with pytest.raises(UserError, match=r"no document stays \(.*left out: below 20 characters 1\)"):
        select(monkeypatch, tmp_path, "--files", tmp_path / "a.txt", "--query", "눈", "--output_dir", tmp_path / "o")
