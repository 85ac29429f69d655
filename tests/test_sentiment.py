"""finetune/sentiment.py: what was written, judged as the classifier judges files."""

import json
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
    models = ("--model_name_or_path", paused_model, "--classifier", paused_model)
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
        (["--classifier", "x", "--model_name_or_path", "/nowhere"], "/nowhere: cannot be loaded"),
    ],
)
def test_a_mistake_is_named(monkeypatch, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        call(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
