"""The tasks: what they read from published files and from the hub, and what they say about bad ones."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from finetune.arguments import DataArguments
from finetune.data import read, sources
from finetune.tasks import ENCODER_TASKS, TASKS, Source
from kozero.data.readers import LeftOut, read_hub
from kozero.errors import UserError
from tests.helpers import ROOT, SAMPLE_DATA
from tests.hub import hub

NSMC, NLI, KORQUAD = TASKS["nsmc"], TASKS["klue_nli"], TASKS["korquad"]
REAL_DATA = Path(os.environ.get("KOZERO_DATA") or Path(__file__).parents[2] / "shared" / "data")
HEADER = "id\tdocument\tlabel\n"
CONTEXT = "세종은 1443년에 훈민정음을 만들었다."
PAIR = {"guid": "p1", "premise": "비가 온다.", "hypothesis": "날이 맑다.", "gold_label": "contradiction"}


def examples_of(task, source: Source, left_out: LeftOut | None = None) -> list:
    return list(task.examples(source, left_out or LeftOut()))


def of_row(task, row: dict):
    """The one example of a row in the form of the hub."""
    (example,) = task.examples_of_row("hub row 1", row)
    return example


def question(answers, context: str = CONTEXT, **other) -> dict:
    return {"id": "q1", "title": "세종", "context": context, "question": "언제 만들었나?", "answers": answers} | other


@pytest.fixture
def nsmc_file(tmp_path):
    def write(text: str, encoding: str = "utf-8") -> Path:
        path = tmp_path / "ratings.txt"
        path.write_bytes(text.encode(encoding))
        return path

    return write


@pytest.fixture
def json_file(tmp_path):
    def write(value, name: str = "data.json") -> Path:
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
        return path

    return write


def korquad_json(*questions: dict, context: str | None = CONTEXT) -> dict:
    paragraph = {"qas": list(questions)} | ({} if context is None else {"context": context})
    return {"version": "KorQuAD_v1.0_dev", "data": [{"title": "세종", "paragraphs": [paragraph]}]}


def asked(answers: list | None) -> dict:
    return {"id": "q1", "question": "언제 만들었나?"} | ({} if answers is None else {"answers": answers})


# What is read ------------------------------------------------------------------------------------------------------


def test_the_golden_text_of_a_review():
    example = of_row(NSMC, {"id": "9976970", "document": "아 더빙.. 진짜 짜증나네요 목소리", "label": "0"})
    assert " ".join(NSMC.training_pair(example)) == "부정 아 더빙.. 진짜 짜증나네요 목소리"


def test_a_review_is_scored_after_both_polarity_words():
    example = of_row(NSMC, {"id": "1", "document": "최고!", "label": 1})
    assert NSMC.choices(example) == [("부정", "최고!"), ("긍정", "최고!")]
    assert NSMC.training_pair(example) == ("긍정", "최고!")
    assert example.label == 1


@pytest.mark.parametrize(
    ("given", "word"),
    [("entailment", "함의"), ("neutral", "중립"), ("contradiction", "모순"), (0, "함의"), (1, "중립"), (2, "모순")],
)
def test_inference_labels_are_korean_words_by_name_and_by_hub_number(given, word):
    example = of_row(NLI, PAIR | {"gold_label": given})
    assert example.targets == (word,)
    assert NLI.labels[example.label] == word


def test_a_pair_is_premise_hypothesis_and_the_word_of_its_label():
    row = {"guid": "p1", "premise": "비가 온다.", "hypothesis": "날이 맑다.", "label": 2}  # as on the hub
    example = of_row(NLI, row)
    assert example.context == "전제: 비가 온다."
    assert NLI.training_pair(example) == ("가설: 날이 맑다. 관계:", "모순")
    assert [target for _prompt, target in NLI.choices(example)] == ["함의", "중립", "모순"]
    assert example.group == "비가 온다."


@pytest.mark.parametrize(
    "answers",
    [
        [{"text": "1443년", "answer_start": 4}, {"text": "1443년에", "answer_start": 4}],
        {"text": ["1443년", "1443년에"], "answer_start": [4, 4]},  # as on the hub
    ],
    ids=["file", "hub"],
)
def test_a_question_has_all_its_answers_and_trains_on_the_first(answers):
    example = of_row(KORQUAD, question(answers))
    assert example.targets == ("1443년", "1443년에")
    assert KORQUAD.training_pair(example) == ("질문: 언제 만들었나? 정답:", "1443년")
    assert example.context == f"문맥: {CONTEXT}"
    assert example.group == "세종"


def test_answers_stay_in_their_order_each_of_them_once():
    told = [{"text": text, "answer_start": CONTEXT.index(text)} for text in ("세종", "1443년", "세종")]
    assert of_row(KORQUAD, question(told)).targets == ("세종", "1443년")


@pytest.mark.parametrize("context", [CONTEXT, f"  \n{CONTEXT} "])
def test_the_span_points_at_the_answer_in_the_context(context):
    start = context.index("훈민정음")
    example = of_row(KORQUAD, question([{"text": "훈민정음", "answer_start": start}], context))
    assert example.context[slice(*example.answer_span)] == "훈민정음"


def test_an_encoder_reads_passage_and_question_as_they_are_written():
    context = f"  \n{CONTEXT} "
    answers = [{"text": "훈민정음", "answer_start": context.index("훈민정음")}]
    for task in ENCODER_TASKS.values():
        example = of_row(task, question(answers, context))
        assert (example.context, example.prompt, example.targets) == (CONTEXT, "언제 만들었나?", ("훈민정음",))
        assert example.context[slice(*example.answer_span)] == "훈민정음"


@pytest.mark.parametrize(("task", "train", "validation"), [(NSMC, 480, 120), (NLI, 300, 60), (KORQUAD, 150, 30)])
def test_the_sample_data_read_whole(task, train, validation):
    left_out = LeftOut()
    for name, least in zip(task.sample_files, (train, validation), strict=True):
        examples = examples_of(task, Source(SAMPLE_DATA / name), left_out)
        assert len(examples) >= least
        assert len({e.id for e in examples}) == len(examples)
    assert not left_out.counts


@pytest.mark.parametrize("task", [NSMC, NLI])
def test_the_sample_data_hold_every_label(task):
    for name in task.sample_files:
        labels = Counter(e.label for e in examples_of(task, Source(SAMPLE_DATA / name)))
        assert set(labels) == set(range(len(task.labels)))
        assert max(labels.values()) < 0.7 * labels.total()


@pytest.mark.parametrize("task", [NLI, KORQUAD])
def test_no_group_of_the_sample_data_is_in_both_files(task):
    train, validation = ({e.group for e in examples_of(task, Source(SAMPLE_DATA / n))} for n in task.sample_files)
    assert train.isdisjoint(validation)


REAL_FILES = [
    (NSMC, "nsmc/ratings_train.txt", 150_000),
    (NSMC, "nsmc/ratings_test.txt", 50_000),
    (NLI, "klue_nli/klue-nli-train.json", 2_000),
    (NLI, "klue_nli/klue-nli-dev.json", 400),
    (KORQUAD, "korquad/KorQuAD_v1.0_dev.json", 5_774),
]


@pytest.mark.parametrize(("task", "name", "num_rows"), REAL_FILES, ids=[name for _task, name, _num in REAL_FILES])
def test_the_published_data_read_whole(task, name, num_rows):
    path = REAL_DATA / name
    if not path.is_file():
        pytest.skip(f"no {path}; set KOZERO_DATA to a folder with the published files")
    left_out = LeftOut()
    num_examples = sum(1 for _example in task.examples(Source(path), left_out))
    assert num_examples + left_out.counts["empty text"] == num_rows
    assert set(left_out.counts) <= {"empty text"}
    assert left_out.counts["empty text"] < 20


def test_a_file_of_windows_reads_as_any_other(nsmc_file):
    path = nsmc_file("\ufeff" + HEADER.replace("\n", "\r\n") + "1\t좋다\t1\r\n2\t나쁘다\t0\r\n")
    assert [e.targets[0] for e in examples_of(NSMC, Source(path))] == ["좋다", "나쁘다"]


def test_a_quotation_mark_in_a_review_swallows_no_lines(nsmc_file):
    path = nsmc_file(HEADER + '1\t"좋다\t1\n2\t나"쁘다\t0\n')
    assert [e.targets[0] for e in examples_of(NSMC, Source(path))] == ['"좋다', '나"쁘다']


def test_a_line_separator_inside_a_review_is_no_new_line(nsmc_file):
    path = nsmc_file(HEADER + "1\t좋\u2028다\x85!\t1\n")
    assert [e.targets[0] for e in examples_of(NSMC, Source(path))] == ["좋\u2028다\x85!"]


def test_pairs_may_be_written_one_a_line(json_file):
    lines = "\n".join(json.dumps(PAIR | {"guid": str(n)}, ensure_ascii=False) for n in range(3))
    assert [e.id for e in examples_of(NLI, Source(json_file(lines, "data.jsonl")))] == ["0", "1", "2"]


# The hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """A folder that `datasets` loads by its path, and a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    return folder


def test_inference_pairs_come_from_the_hub_with_numbered_labels(local_hub):
    import datasets

    features = datasets.Features(
        {name: datasets.Value("string") for name in ("guid", "premise", "hypothesis")}
        | {"label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])}
    )
    rows = {"guid": ["a", "b"], "premise": ["비가 온다."] * 2, "hypothesis": ["날이 맑다.", "날이 흐리다."]}
    datasets.Dataset.from_dict(rows | {"label": [2, 0]}, features).to_parquet(local_hub / "train.parquet")
    examples = examples_of(NLI, Source(hub=(str(local_hub), None, "train")))
    assert [(e.id, e.targets[0]) for e in examples] == [("a", "모순"), ("b", "함의")]


def test_questions_come_from_the_hub_with_answers_as_lists(local_hub):
    import datasets

    answers = {"text": ["훈민정음"], "answer_start": [CONTEXT.index("훈민정음")]}
    datasets.Dataset.from_list([question(answers)]).to_parquet(local_hub / "validation.parquet")
    (example,) = examples_of(KORQUAD, Source(hub=(str(local_hub), None, "validation")))
    assert example.targets == ("훈민정음",)


def test_a_bad_row_of_the_hub_is_named_by_data_set_split_and_row(local_hub):
    (local_hub / "train.json").write_text(
        "\n".join(json.dumps({"id": "1", "document": "좋다", "label": label}) for label in (1, 7)), encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"hub:train row 2.*7"):
        examples_of(NSMC, Source(hub=(str(local_hub), None, "train")))


@pytest.mark.parametrize("config", [None, "nli"])
def test_a_data_set_that_is_a_script_is_read_as_the_parquet_files_of_the_hub(local_hub, tmp_path, monkeypatch, config):
    """The library itself tells that it runs no script. The hub's branch holds a folder a config, in it one a split."""
    import datasets

    (local_hub / "hub.py").touch()
    branch, load = tmp_path / "branch", datasets.load_dataset
    for folder, split, text in ((config or "default", "train", "좋다"), (config or "default", "test", "나쁘다")):
        (branch / folder / split).mkdir(parents=True)
        rows = datasets.Dataset.from_list([{"id": "1", "document": text, "label": 1}])
        rows.to_parquet(branch / folder / split / "0000.parquet")
    if config:
        (branch / "sts/train").mkdir(parents=True)
        datasets.Dataset.from_list([{"other": 1}]).to_parquet(branch / "sts/train/0000.parquet")

    def hub(path, split, name=None, data_dir=None, revision=None):
        if revision == "refs/convert/parquet":
            return load(str(branch), data_dir=data_dir, split=split)
        return load(path, name, split=split)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    for split, text in (("train", "좋다"), ("test", "나쁘다")):
        (example,) = examples_of(NSMC, Source(hub=(str(local_hub), config, split)))
        assert example.targets == (text,)


READ_FROM_HUB = """
from finetune.arguments import DataArguments
from finetune.data import read, sources
from finetune.tasks import TASKS
from kozero.data.readers import LeftOut

for source in sources(DataArguments(task="nsmc", from_hub=True), TASKS["nsmc"]):
    print([(example.targets[0], example.label) for example in read(source, TASKS["nsmc"], LeftOut())])
"""


@pytest.mark.slow
def test_nsmc_comes_from_a_hub_where_it_is_a_script(tmp_path):
    """The libraries' own clients, asking a hub on this machine."""
    with hub() as address:
        told = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", READ_FROM_HUB], env=own | told, cwd=ROOT, capture_output=True, text=True
        )
    assert done.stdout.splitlines() == [
        str([("나쁘다", 0), ("좋다", 1), ("별로다", 0)]), str([("지루하다", 0), ("재미있다", 1)]),
    ], done.stderr  # fmt: skip


def test_a_script_without_parquet_files_is_one_line_with_the_way_out(local_hub):
    (local_hub / "hub.py").touch()
    told = (
        r"^data set .*hub:train: cannot be loaded \(RuntimeError: Dataset scripts .* hub.py; as parquet: .*--train_file"
    )
    with pytest.raises(UserError, match=told):
        list(read_hub(str(local_hub), None, "train"))


def test_a_data_set_that_cannot_be_reached_is_one_line_with_the_way_out():
    with pytest.raises(UserError, match=r"klue/nli:train.*--train_file") as caught:
        list(read_hub("klue", "nli", "train"))
    assert "\n" not in str(caught.value)


# The validation split ----------------------------------------------------------------------------------------------


def split(groups: list[str], fraction: float = 0.3) -> tuple[set[str], set[str]]:
    sides = (Source(Path("x"), side=side, validation_fraction=fraction) for side in ("train", "validation"))
    train, validation = ({g for g in groups if side.takes(g)} for side in sides)
    return train, validation


def test_every_group_is_on_exactly_one_side():
    groups = [f"문서 {n}" for n in range(1000)]
    train, validation = split(groups)
    assert train | validation == set(groups)
    assert train.isdisjoint(validation)
    assert 230 < len(validation) < 370


def test_the_side_of_a_group_does_not_depend_on_order_or_company():
    """Nor on the version: scores of earlier runs are of the same examples."""
    assert split([f"글 {n}" for n in range(20)])[1] == {"글 2", "글 13", "글 14", "글 18"}
    groups = [f"문서 {n}" for n in range(1000)]
    assert split(groups[::-1]) == split(groups)
    assert split(groups[:100])[1] == split(groups)[1] & set(groups[:100])


@pytest.mark.parametrize("task", [NLI, KORQUAD])
def test_a_split_file_keeps_premises_and_articles_together(task):
    path = SAMPLE_DATA / task.sample_files[0]
    arguments = DataArguments(task=task.name, train_file=str(path), validation_fraction=0.3)
    train, validation = (list(read(source, task, LeftOut())) for source in sources(arguments, task))
    assert len(train) + len(validation) == len(examples_of(task, Source(path)))
    assert {e.group for e in train}.isdisjoint({e.group for e in validation})
    assert validation


def test_the_sample_data_are_used_when_no_data_are_named():
    train, validation = sources(DataArguments(task="nsmc"), NSMC)
    assert train.path == SAMPLE_DATA / "nsmc/ratings_train.txt"
    assert validation.path == SAMPLE_DATA / "nsmc/ratings_test.txt"


# Bad input ---------------------------------------------------------------------------------------------------------


def refused(task, source: Source | Path) -> str:
    """The one line that a user reads."""
    with pytest.raises(UserError) as caught:
        examples_of(task, source if isinstance(source, Source) else Source(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("task", "name"), [(NSMC, "x.txt"), (NLI, "x.json"), (NLI, "x.jsonl"), (KORQUAD, "x.json")])
def test_a_missing_file_is_named(tmp_path, task, name):
    assert f"{tmp_path / name}: no such file" in refused(task, tmp_path / name)


@pytest.mark.parametrize(("task", "name"), [(NSMC, "x.csv"), (NLI, "x.tsv"), (KORQUAD, "x.jsonl")])
def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(json_file, task, name):
    message = refused(task, json_file("", name))
    assert name in message
    assert ".txt" in message or ".json" in message


def test_a_wrong_column_is_named_with_those_that_are_there(nsmc_file):
    message = refused(NSMC, nsmc_file("id\treview\tlabel\n1\t좋다\t1\n"))
    assert "ratings.txt:1: no column 'document'; found id, review, label" in message


def test_a_wrong_number_of_fields_is_named_by_line(nsmc_file):
    message = refused(NSMC, nsmc_file(HEADER + "1\t좋다\t1\n2\t나쁘\t다\t0\n"))
    assert "ratings.txt:3: 4 fields, the header has 3" in message


@pytest.mark.parametrize("label", ["2", "-1", "긍", "", "1.0"])
def test_a_review_label_out_of_range_is_named_by_line_and_value(nsmc_file, label):
    assert f"ratings.txt:2: label '{label}'" in refused(NSMC, nsmc_file(HEADER + f"1\t좋다\t{label}\n"))


def test_empty_reviews_are_left_out_and_counted(nsmc_file):
    left_out = LeftOut()
    path = nsmc_file(HEADER + "1\t\t1\n2\t좋다\t1\n3\t   \t0\n")
    assert [e.id for e in examples_of(NSMC, Source(path), left_out)] == ["2"]
    assert left_out.lines() == [f"left out 2 rows: empty text (first: {path}:2)"]


def test_a_file_in_another_encoding_is_named_by_line_with_the_way_to_convert_it(nsmc_file):
    message = refused(NSMC, nsmc_file(HEADER + "1\tgood\t1\n2\t나쁘다\t0\n", "cp949"))
    assert "ratings.txt:3: not UTF-8" in message
    assert "iconv" in message


def test_json_in_another_encoding_is_named(tmp_path):
    (tmp_path / "data.json").write_bytes(json.dumps([PAIR], ensure_ascii=False).encode("cp949"))
    assert "data.json:1: not UTF-8" in refused(NLI, tmp_path / "data.json")


def test_an_empty_review_file_is_named_with_what_belongs_there(nsmc_file):
    assert "ratings.txt: empty file" in refused(NSMC, nsmc_file(""))


@pytest.mark.parametrize(("task", "text"), [(NLI, ""), (NLI, "[]"), (KORQUAD, ""), (KORQUAD, '{"data": []}')])
def test_an_empty_json_file_is_refused(json_file, task, text):
    told = "no examples (it holds no rows)" if text else "not JSON"
    with pytest.raises(UserError, match=rf"data\.json(:1)?: {re.escape(told)}"):
        list(read(Source(json_file(text)), task, LeftOut()))


def test_a_file_of_nothing_but_empty_rows_is_refused(nsmc_file):
    with pytest.raises(UserError, match=r"ratings\.txt: no examples"):
        list(read(Source(nsmc_file(HEADER + "1\t\t1\n")), NSMC, LeftOut()))


def test_a_broken_line_is_named(json_file):
    lines = json.dumps(PAIR) + "\n" + json.dumps(PAIR)[:-5] + "\n"
    assert "data.jsonl:2: not JSON" in refused(NLI, json_file(lines, "data.jsonl"))


def test_broken_json_is_named_by_line(json_file):
    assert "data.json:3: not JSON" in refused(NLI, json_file('[\n{"premise": "가"},\n{"premise" "나"}\n]'))


def test_json_of_another_form_is_named(json_file):
    assert "expected a JSON list" in refused(NLI, json_file({"data": [PAIR]}))
    assert "item 2: not a JSON object" in refused(NLI, json_file([PAIR, "비가 온다."]))
    assert "no list 'data'" in refused(KORQUAD, json_file({"paragraphs": []}))
    assert "expected a JSON object" in refused(KORQUAD, json_file([PAIR]))


@pytest.mark.parametrize("field", ["premise", "hypothesis", "gold_label"])
def test_a_missing_field_is_named_by_item(json_file, field):
    row = {name: value for name, value in PAIR.items() if name != field}
    message = refused(NLI, json_file([PAIR, row]))
    assert f"item 2: no field '{field}'" in message


def test_a_field_that_is_no_text_is_named(json_file):
    assert "item 1: field 'premise' is int, not text" in refused(NLI, json_file([PAIR | {"premise": 3}]))


@pytest.mark.parametrize("label", ["-", 3, -1, None, True, "entail"])
def test_an_inference_label_out_of_range_is_named_by_item_and_value(json_file, label):
    message = refused(NLI, json_file([PAIR, PAIR | {"gold_label": label}]))
    assert f"item 2: label {label!r} is out of range" in message
    assert "2 (contradiction)" in message


def test_an_answer_that_is_not_in_the_context_is_named_by_question_and_value(json_file):
    path = json_file(korquad_json(asked([{"text": "1444년", "answer_start": 4}])))
    assert "question q1: answer '1444년' does not stand at 4" in refused(KORQUAD, path)


@pytest.mark.parametrize(
    "answers", [[], None, "1443년", [{"text": "1443년"}], [3], {"text": ["가"], "answer_start": []}]
)
def test_a_question_without_usable_answers_is_named(json_file, answers):
    assert "question q1" in refused(KORQUAD, json_file(korquad_json(asked(answers))))


@pytest.mark.parametrize("start", [-5, "4", 4.0, None])
def test_a_place_that_is_no_place_is_named_with_its_value(json_file, start):
    message = refused(KORQUAD, json_file(korquad_json(asked([{"text": "1443년", "answer_start": start}]))))
    assert f"question q1: answer '1443년' at {start!r}" in message


def test_a_question_without_context_is_named(json_file):
    message = refused(KORQUAD, json_file(korquad_json(asked([{"text": "가", "answer_start": 0}]), context=None)))
    assert "question q1: no field 'context'" in message


def test_a_lone_half_of_a_character_is_refused_by_item(json_file):
    """JSON can spell one (\\ud83d); it cannot be encoded, so it would end the run inside the tokenizer."""
    text = json.dumps([PAIR | {"hypothesis": "좋다 \ud83d"}])
    assert "item 1" in refused(NLI, json_file(text))


def test_bad_rows_can_be_skipped_and_are_counted_with_the_first_place(nsmc_file):
    left_out = LeftOut()
    path = nsmc_file(HEADER + "1\t좋다\t1\n2\t나쁘다\t5\n3\t셋\n4\t넷\t0\n")
    assert [e.id for e in examples_of(NSMC, Source(path, skip_bad_rows=True), left_out)] == ["1", "4"]
    assert left_out.counts == {"bad row": 2}
    assert f"{path}:3: label '5'" in left_out.lines()[0]


def test_bad_questions_can_be_skipped(json_file):
    good, bad = {"text": "1443년", "answer_start": 4}, {"text": "없는 말", "answer_start": 0}
    path = json_file(korquad_json(asked([bad]), asked([good]), asked([])))
    left_out = LeftOut()
    assert len(examples_of(KORQUAD, Source(path, skip_bad_rows=True), left_out)) == 1
    assert left_out.counts == {"bad row": 2}


def test_what_is_not_in_the_published_form_costs_no_other_question(json_file):
    good = asked([{"text": "1443년", "answer_start": 4}])
    whole = korquad_json(good, good)
    paragraph = whole["data"][0]["paragraphs"][0]
    whole["data"] += [
        "article",
        {"title": "없음"},
        {"paragraphs": [3, {"context": "가"}, paragraph | {"qas": [7, good]}]},
    ]
    left_out = LeftOut()
    assert len(examples_of(KORQUAD, Source(json_file(whole), skip_bad_rows=True), left_out)) == 3
    assert left_out.counts == {"bad row": 5}
    assert "article 2: not a JSON object" in left_out.lines()[0]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"paragraphs": None}, "article 1: no list 'paragraphs'"),
        ({"paragraphs": [{"context": "가"}]}, "article 1 paragraph 1: no list 'qas'"),
        ({"paragraphs": [{"context": "가", "qas": [[]]}]}, "article 1 paragraph 1 question 1: not a JSON object"),
    ],
)
def test_a_part_of_another_form_is_named(json_file, broken, message):
    assert message in refused(KORQUAD, json_file({"data": [broken]}))


def test_two_columns_of_one_name_are_refused(nsmc_file):
    path = nsmc_file("id\tdocument\tlabel\tlabel\n1\t좋다\t1\t0\n")
    assert "ratings.txt:1: two columns of one name" in refused(NSMC, path)


def test_utf_16_is_answered_with_its_own_conversion(nsmc_file, tmp_path):
    assert "iconv -f utf-16" in refused(NSMC, nsmc_file(HEADER + "1\t좋다\t1\n", "utf-16"))
    (tmp_path / "data.json").write_text("[]", encoding="utf-16")
    assert "iconv -f utf-16" in refused(NLI, tmp_path / "data.json")


def test_no_examples_are_explained(nsmc_file):
    with pytest.raises(UserError, match=r"no examples .left out 2 rows: empty text"):
        list(read(Source(nsmc_file(HEADER + "1\t\t1\n2\t\t0\n")), NSMC, LeftOut()))
    one = nsmc_file(HEADER + "1\t좋다\t1\n")
    sides = [Source(one, side=side, validation_fraction=0.5) for side in ("train", "validation")]
    empty = next(side for side in sides if not examples_of(NSMC, side))
    with pytest.raises(
        UserError, match=r"no examples .all groups are on the other side; change --validation_fraction or give"
    ):
        list(read(empty, NSMC, LeftOut()))


def test_the_command_line_choice_reaches_both_sources(nsmc_file):
    path = str(nsmc_file(HEADER + "".join(f"{k}\t{k}번 좋다\t1\n" for k in range(50))))  # some for each side
    for other in ({}, {"validation_file": path}):
        assert all(s.skip_bad_rows for s in sources(DataArguments(train_file=path, bad_rows="skip", **other), NSMC))


def test_reading_stops_at_the_limit(nsmc_file):
    path = nsmc_file(HEADER + "1\t좋다\t1\n2\t나쁘다\t0\n3\t넷\t9\n")
    assert [e.id for e in read(Source(path), NSMC, LeftOut(), limit=2)] == ["1", "2"]


def test_a_label_of_thousands_of_digits_is_a_bad_row(nsmc_file, json_file):
    assert "out of range" in refused(NSMC, nsmc_file(HEADER + f"1\t좋다\t{'1' * 5000}\n"))
    line = json.dumps(PAIR)[:-1] + ', "extra": ' + "1" * 5000 + "}"
    assert "not JSON" in refused(NLI, json_file(line, "data.jsonl"))
