"""finetune/evaluate.py --sweep_pauses: one model over numbers and placements of pauses."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from finetune import evaluate, sweep
from finetune.data import EvaluationSet
from finetune.scoring import Scores
from finetune.sweep import Cell, as_csv, measure, require_room, settings_of, warnings
from kozero.errors import UserError
from kozero.pause import Pauses
from tests.helpers import ROOT, MemoryStore


def cell(placement: str, num: int, value: float, score: str = "accuracy") -> Cell:
    return Cell(placement, num, score, value, 0.1, 20.0 + num, 0, 0, {score: value}, [value])


def lower(placement: str, num: int, value: float) -> Cell:
    return cell(placement, num, value, "perplexity")


def test_a_sweep_has_no_pauses_once_and_every_other_number_in_every_placement():
    assert settings_of("5, 0,1", "append,filler,append") == [
        ("none", 0), ("append", 1), ("append", 5), ("filler", 1), ("filler", 5),
    ]  # fmt: skip
    assert settings_of("3", "prepend") == [("prepend", 3)]


@pytest.mark.parametrize(
    ("numbers", "placements", "message"),
    [
        ("1;2", "append", "--sweep_pauses 1;2: write numbers with commas"),
        ("-1", "append", "--sweep_pauses -1: must be 0 or more"),
        ("1", "apend", "--sweep_placement apend: no such placement, did you mean 'append'"),
    ],
)
def test_a_mistake_is_named(numbers, placements, message):
    with pytest.raises(UserError, match=message):
        settings_of(numbers, placements)


def test_a_collapse_without_pauses_is_told():
    (line,) = warnings([cell("none", 0, 0.3), cell("append", 2, 0.4), cell("append", 9, 0.7)])
    assert line.startswith("warning: without pauses accuracy is 0.3000, with 9 (append) 0.7000")


def test_pauses_that_do_not_help_are_told():
    (line,) = warnings([cell("none", 0, 0.5), cell("append", 2, 0.5), cell("filler", 2, 0.4)])
    assert line == "warning: no number of pauses beats none (accuracy 0.5000)"


def test_a_gain_without_a_collapse_is_no_warning():
    assert warnings([cell("none", 0, 0.5), cell("append", 2, 0.6)]) == warnings([cell("append", 2, 0.6)]) == []


def test_warnings_of_a_score_of_which_less_is_better_are_the_other_way_round():
    (line,) = warnings([lower("none", 0, 90.0), lower("append", 2, 80.0), lower("append", 9, 40.0)])
    assert line.startswith("warning: without pauses perplexity is 90.0000, with 9 (append) 40.0000")
    (line,) = warnings([lower("none", 0, 20.0), lower("append", 2, 20.0), lower("filler", 2, 90.0)])
    assert line == "warning: no number of pauses beats none (perplexity 20.0000)"
    assert warnings([lower("none", 0, 50.0), lower("append", 2, 40.0), lower("append", 9, 200.0)]) == []


def test_the_table_has_a_line_a_cell():
    rows = list(csv.DictReader(as_csv([cell("none", 0, 0.5), cell("append", 2, 0.6)]).splitlines()))
    assert [(row["placement"], row["num_pauses"], row["value"]) for row in rows] == [
        ("none", "0", "0.5"), ("append", "2", "0.6"),
    ]  # fmt: skip


def test_time_and_tokens_are_those_of_an_example(monkeypatch):
    clock = iter([100.0, 103.0])
    monkeypatch.setattr(sweep, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(sweep, "score", lambda *_: Scores({"f1": 50.0}, ["가"] * 4, [0, 100, 0, 100], 2, 1, 60))
    data = EvaluationSet(SimpleNamespace(best_score="f1"), [None] * 4, MemoryStore([]))
    found = measure(None, SimpleNamespace(tokenizer=None), data, Pauses(7, 5, "prepend"), 16, 2)
    assert (found.seconds_per_example, found.tokens_per_example) == (0.75, 15.0)
    assert (found.placement, found.num_pauses, found.value, found.num_cut, found.num_left_out) == (
        "prepend",
        5,
        50,
        2,
        1,
    )


@pytest.mark.parametrize(("labels", "room"), [((), 3), (("가", "나"), 7)])
def test_a_number_of_pauses_that_leaves_no_room_for_an_answer_is_refused(labels, room):
    """Of a row of 16 tokens a prompt has 9 and an answer that is to be written 4 at most."""
    store = MemoryStore([([], range(10, 19), [])] * 2)
    data = EvaluationSet(SimpleNamespace(labels=labels, max_new_tokens=4), [None] * 2, store)
    require_room(data, [("none", 0), ("append", room)], 16)
    with pytest.raises(UserError, match=rf"--sweep_pauses {room + 1}: 2 rows do not fit 16 tokens"):
        require_room(data, [("none", 0), ("append", room), ("append", room + 1)], 16)


@pytest.mark.parametrize("task", ["nsmc", "korquad"])
def test_a_sweep_scores_as_single_evaluations_do(monkeypatch, tmp_path, paused_model, task):
    monkeypatch.chdir(ROOT)
    shared = [
        "--model_name_or_path",
        paused_model,
        "--task",
        task,
        "--max_eval_samples",
        "6",
        "--max_seq_length",
        "128",
    ]
    shared += ["--cache_dir", str(tmp_path / "cache"), "--output_file"]
    call(monkeypatch, *shared, str(tmp_path / "s.json"), "--sweep_pauses", "0,2", "--sweep_placement", "append,prepend")
    found = json.loads((tmp_path / "s.json").read_text())
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "s.csv").is_file()
    assert [(row["placement"], row["num_pauses"]) for row in found["cells"]] == [
        ("none", 0), ("append", 2), ("prepend", 2),
    ]  # fmt: skip
    for row in found["cells"]:
        alone = ["--num_inference_pauses", str(row["num_pauses"])]
        alone += ["--pause_placement", row["placement"]] if row["num_pauses"] else []
        call(monkeypatch, *shared, str(tmp_path / "one.json"), *alone)
        assert json.loads((tmp_path / "one.json").read_text())["scores"] == row["scores"]
        lines = (tmp_path / "one.predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["score"] for line in lines] == row["each"]
        assert sum(row["each"]) / len(row["each"]) == pytest.approx(row["value"])
    tokens = [row["tokens_per_example"] for row in found["cells"]]
    rows_of_an_example = 2 if task == "nsmc" else 1
    if task == "nsmc":  # of a written answer the length may differ
        assert tokens[1] == tokens[2] == tokens[0] + 2 * rows_of_an_example


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    evaluate.main()
    assert not torch.distributed.is_initialized()  # ranks leave together
