"""finetune/sentiment.py: what was written, judged as the classifier judges files."""

import json
import shutil
import sys

import pytest

from finetune import evaluate, sentiment
from finetune.sentiment import save_reviews
from kozero.errors import UserError


def call(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["sentiment.py", *map(str, flags)])
    sentiment.main()


def test_agreement_is_the_accuracy_of_the_classifier_on_what_was_written(monkeypatch, tmp_path, paused_model, capsys):
    out = tmp_path / "out"
    judge = shutil.copytree(paused_model, tmp_path / "judge")
    models = ("--model_name_or_path", paused_model, "--classifier", judge)
    call(
        monkeypatch, *models, "--num_samples", 6, "--max_new_tokens", 12, "--max_eval_samples", 10, "--output_dir", out
    )
    told = json.loads((out / "sentiment.json").read_text(encoding="utf-8"))
    lines = (out / "generated.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) - 1 + told["scores"]["empty"] == told["scores"]["generated"] == 12
    assert {line.split("\t")[2] for line in lines[1:]} <= {"0", "1"}
    for name, flags in (
        ("generated", ("--validation_file", out / "generated.txt")),
        ("real", ("--max_eval_samples", 10)),
    ):
        scores = tmp_path / f"{name}.json"
        argv = ["evaluate.py", "--model_name_or_path", paused_model, "--task", "nsmc", "--output_file", str(scores)]
        monkeypatch.setattr(sys, "argv", [*argv, *map(str, flags)])
        evaluate.main()
        assert json.loads(scores.read_text())["scores"] == pytest.approx(told[name])
        assert told["scores"][f"agreement_with_{name}"] == told[name]["accuracy"]
    assert "agreement_with_generated" in capsys.readouterr().out


def test_reviews_that_it_reads_are_not_written_over(monkeypatch, tmp_path, paused_model):
    file, judge = tmp_path / "out/generated.txt", shutil.copytree(paused_model, tmp_path / "judge")
    file.parent.mkdir()
    file.write_text("id\tdocument\tlabel\n1\t좋다\t1\n", encoding="utf-8")
    models = ("--model_name_or_path", paused_model, "--classifier", judge)
    with pytest.raises(UserError, match=r"--output_dir .*generated.txt: is read by this command"):
        call(monkeypatch, *models, "--num_samples", 1, "--validation_file", file, "--output_dir", file.parent)
    assert "좋다" in file.read_text(encoding="utf-8")


def test_what_is_judged_is_the_review_with_the_word_that_asked_for_it(monkeypatch, tmp_path, paused_model):
    """Of a writer that obeys every label is right, of one that does the reverse none."""
    judge = shutil.copytree(paused_model, tmp_path / "judge")
    reviews = {"긍정": "참 좋은 영화다", "부정": "정말 나쁜 영화다"}

    for obeys in (True, False):

        def write(self, texts, *told, obeys=obeys, **settings):
            other = {"긍정": "부정", "부정": "긍정"}
            return [reviews[text if obeys else other[text]] for text in texts]

        monkeypatch.setattr(sentiment.PausedGenerator, "generate", write)
        out = tmp_path / f"out-{obeys}"
        models = ("--model_name_or_path", paused_model, "--classifier", judge)
        call(monkeypatch, *models, "--num_samples", 3, "--max_eval_samples", 2, "--output_dir", out)
        rows = [line.split("\t")[1:] for line in (out / "generated.txt").read_text(encoding="utf-8").splitlines()[1:]]
        right = [reviews["긍정" if label == "1" else "부정"] == text for text, label in rows]
        assert len(rows) == 6 and all(right) == obeys and any(right) == obeys


def test_reviews_become_rows_and_empty_ones_are_counted(tmp_path):
    empty = save_reviews(tmp_path / "g.txt", {"부정": ["나쁘다\n정말", " "], "긍정": ["좋다\t참"]})
    assert empty == 1
    rows = (tmp_path / "g.txt").read_text(encoding="utf-8").splitlines()
    assert rows == ["id\tdocument\tlabel", "부정-0\t나쁘다 정말\t0", "긍정-0\t좋다 참\t1"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--classifier", "x"], "--model_name_or_path and --classifier: give both"),
        (["--classifier", "x", "--model_name_or_path", "y", "--num_samples", "0"], "--num_samples 0"),
        (["--classifier", "/nowhere", "--model_name_or_path", "y"], "--classifier /nowhere: no such folder"),
        (["--classifier", "x", "--model_name_or_path", "y", "--temperature", "0"], "--temperature 0: writes the same"),
        (["--classifier", ".", "--model_name_or_path", "."], "--classifier .: is the model that writes"),
    ],
)
def test_a_mistake_is_named(monkeypatch, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        call(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
