"""What is wrong with a file is told before a model is loaded: each entry is given a model that is not there."""

import json
import shutil
import sys

import pytest

from finetune import evaluate, generate, harness, sentiment, train
from kozero.errors import UserError
from pretrain import run as pretraining
from tests.helpers import ROOT, SAMPLE_DATA

pytestmark = pytest.mark.usefixtures("one_rank")
NO_MODEL = ["--model_name_or_path", "./no-such-model"]
NSMC, KORQUAD = SAMPLE_DATA / "nsmc/ratings_test.txt", SAMPLE_DATA / "korquad/KorQuAD_v1.0_dev.json"
HEADER = "id\tdocument\tlabel\n"


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def article(**question: object) -> str:
    paragraph = {"context": "가나다", "qas": [{"id": "1", "question": "무엇", **question}]}
    return json.dumps({"data": [{"title": "x", "paragraphs": [paragraph]}]}, ensure_ascii=False)


# By the end of the file's name: its bytes, and what is said of it.
REVIEWS = {
    "suffix.csv": (NSMC.read_bytes(), "suffix.csv: this task reads .txt, .tsv"),
    "column.txt": (b"id\ttext\tlabel\n1\ta\t1\n", "column.txt:1: no column 'document'"),
    "label.txt": (f"{HEADER}1\t좋다\t긍\n".encode(), "label.txt:2: label '긍' is out of range"),
    "fields.txt": (f"{HEADER}1\t좋다\t1\n2\t좋다\n".encode(), "fields.txt:3: 2 fields, the header has 3"),
    "cp949.txt": (f"{HEADER}1\t좋다\t1\n".encode("cp949"), "cp949.txt:2: not UTF-8"),
    "empty.txt": (b"", "empty.txt: empty file"),
    "rows.txt": (HEADER.encode(), "rows.txt: no examples (it holds no rows)"),
    "missing.txt": (None, "missing.txt: no such file"),
}
QUESTIONS = {
    "suffix.txt": (KORQUAD.read_bytes(), "suffix.txt: this task reads .json"),
    "list.json": (b"[]", "list.json"),
    "data.json": (b"{}", "data.json: no list 'data'"),
    "answers.json": (article(answer=1).encode(), "'answers' must be a list"),
    "place.json": (article(answers=[{"text": "나", "answer_start": 2}]).encode(), "does not stand at 2"),
    "missing.json": (None, "missing.json: no such file"),
}
PROMPTS = {"empty.txt": (b"\n", "no prompt in it"), "cp949.txt": ("긍정".encode("cp949"), "cp949.txt:1: not UTF-8")}
CORPUS = {
    "missing.txt": (None, "missing.txt: no such file"),
    "blank.txt": (b"\n \n", "blank.txt: no text in it"),
    "cp949.txt": ("긍정이다\n".encode("cp949"), "cp949.txt:1: not UTF-8"),
}
SENTIMENT = ["--model_name_or_path", "./no-such-model", "--classifier", "./no-such-judge"]
METADATA = ["--model_args", "pretrained=./no-such-model", "--tasks", "kozero_nsmc"]
PRETRAINING = ["--model_name", "x", "--train_batch_size", "1", "--checkpoint", "./no-such-model"]

# What is called, with which arguments, which one takes the file, and what is tried.
ENTRIES = {
    "train nsmc": (train.main, [*NO_MODEL, "--validation_file", str(NSMC)], "--train_file", REVIEWS),
    "validate nsmc": (train.main, [*NO_MODEL, "--train_file", str(NSMC)], "--validation_file", REVIEWS),
    "train mrc": (train.main, [*NO_MODEL, "--task", "mrc"], "--train_file", QUESTIONS),
    "train korquad": (train.main, [*NO_MODEL, "--task", "korquad"], "--train_file", QUESTIONS),
    "passages": (train.main, [*NO_MODEL, "--train_mode", "encoder"], "--validation_file", QUESTIONS),
    "evaluate nsmc": (evaluate.main, [*NO_MODEL, "--task", "nsmc"], "--validation_file", REVIEWS),
    "sweep": (evaluate.main, [*NO_MODEL, "--sweep_pauses", "0,1"], "--validation_file", REVIEWS),
    "evaluate ict": (evaluate.main, [*NO_MODEL, "--task", "ict"], "--validation_file", QUESTIONS),
    "generate": (generate.main, NO_MODEL, "--prompts_file", PROMPTS),
    "sentiment": (sentiment.main, SENTIMENT, "--validation_file", REVIEWS),
    "harness": (harness.main, METADATA, "--metadata", REVIEWS),
    "pre-training": (lambda: pretraining.main("train"), PRETRAINING, "--corpus_path", CORPUS),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_mistake_in_a_file_is_told_before_the_model_is_looked_for(monkeypatch, tmp_path, entry):
    main, flags, flag, mistakes = ENTRIES[entry]
    for name, (content, message) in mistakes.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        value = json.dumps({"nsmc": str(path)}) if flag == "--metadata" else str(path)
        out = [] if main in (generate.main, evaluate.main, harness.main) else ["--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["prog", *flags, flag, value, *out])
        with pytest.raises(UserError) as told:
            main()
        assert message in str(told.value) and "\n" not in str(told.value), name
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_split_without_examples_is_told_before_the_model_is_looked_for(monkeypatch, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text(f"{HEADER}1\t좋다\t1\n", encoding="utf-8")
    told = [*NO_MODEL, "--train_file", str(path), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prog", *told])
    with pytest.raises(UserError, match="all groups are on the other side"):
        train.main()
