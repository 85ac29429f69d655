"""scripts/pause_study.py: what a study runs, in which order, and what its report says."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from kozero.errors import Diverged, UserError
from kozero.metrics import bootstrap_interval
from scripts import pause_study
from scripts.pause_study import Step, check_all, run_all, steps
from scripts.study import Study
from scripts.study_report import (
    Result,
    as_csv,
    cost_table,
    difference_table,
    pauses_table,
    plot_pauses,
    plot_scores,
    pretraining_table,
    score_table,
    write_report,
)
from tests.helpers import ROOT, refused
from tests.scripts import run_script

SAMPLE = ROOT / "sample_data" / "study.json"
NSMC = str(ROOT / "sample_data/nsmc/ratings_test.txt")


def study_file(folder: Path, **changes) -> Path:
    """The shipped study with other settings; None leaves a key out."""
    values = json.loads(SAMPLE.read_text(encoding="utf-8")) | {"output_dir": str(folder / "study")} | changes
    path = folder / "study.json"
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"seed": [1]}, "'seed'"),
        ({"tasks": {}}, "'tasks': name at least one"),
        ({"tasks": {"nsms": {}}}, "nsms"),
        ({"arms": ["StdPT_PausFT"]}, "StdPT_PausFT"),
        ({"arms": [["StdPT", "StdFT"]]}, "arms [['StdPT', 'StdFT']]: must be different names of StdPT_StdFT"),
        ({"arms": ["StdPT_StdFT"] * 2}, "must be different names"),
        ({"pretraining": {"A": {}, "A_B": {}}, "finetuning": {"C": {}, "B_C": {}}}, "two arms have one name"),
        ({"launch": ""}, "launch '': no such program"),
        ({"title": "One\n# Two"}, "'title': must be one line"),
        ({"launch": "foo --x"}, "launch 'foo --x': no such program"),
        ({"launch": 'python "'}, "No closing quotation"),
        ({"finetune": {"help": True}}, "finetune: 'help' is given by the study"),
        ({"finetune": {"num-pauses": 3}}, "finetune: 'num-pauses': write flags without dashes"),
        ({"finetune": {"train_file": "nowhere.txt"}}, "finetune: train_file 'nowhere.txt': no such file"),
        ({"pretrain": {"config_file": "models/tiny_config.json", "max_seq_length": 500}}, "556 with pauses"),
        ({"finetuning": {"StdFT": {"num_inference_pauses": -1}}}, "pauses of StdPT_StdFT, nsmc: -1"),
        ({"arms": ["StdPT_PauseFT"], "baseline": "StdPT_StdFT"}, "baseline 'StdPT_StdFT'"),
        ({"seeds": [1, 1]}, "seeds [1, 1]"),
        ({"seeds": 3}, "'seeds' must be a list, is 3"),
        ({"finetuning": {"StdFT": {"seed": 3}}}, "finetuning.StdFT: 'seed' is given by the study"),
        ({"finetuning": {"StdFT": {"num_pauses": [1, 2]}}}, "finetuning.StdFT: 'num_pauses' must be one value"),
        ({"finetuning": {"StdFT": {"num_pauses": "3"}}}, "pauses of StdPT_StdFT, nsmc: '3'"),
        ({"finetune": [1]}, "'finetune' must be an object"),
        ({"tasks": {"nsmc": 3}}, "tasks.nsmc: must be an object"),
        ({"pretraining": ["StdPT"]}, "'pretraining' must be an object, is [\"StdPT\"]"),
        ({"finetuning": {"../StdFT": {}}}, "'../StdFT': it names folders"),
        ({"finetuning": {"": {}}}, "'': it names folders"),
        (
            {"pretraining": {"가" * 60: {}}, "finetuning": {"나" * 60: {}}},
            f"arm '{'가' * 60}_{'나' * 60}': names a folder, of 255 bytes at most",
        ),
        ({"sweep_pauses": [0, "2"]}, "sweep_pauses [0, '2']"),
        ({"tasks": {"essay": {}}}, "pauses of StdPT_PauseFT, essay: 4: its texts have no prompt to pause"),
    ],
)
def test_a_wrong_study_is_refused_by_file_and_key(tmp_path, changes, told):
    path = study_file(tmp_path, **({"baseline": None} if "finetuning" in changes else {}), **changes)
    with pytest.raises(UserError) as refused:
        Study.read(path)
    assert str(path) in str(refused.value) and told in str(refused.value)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"finetuning": {"StdFT": {"num_pausess": 3}}}, "--num_pausess"),
        ({"finetuning": {"StdFT": {"num_pauses": 1, "pause_schedule": "sampld"}}}, "sampld"),
        ({"finetuning": {"StdFT": {"pause_placement": "appendd"}}}, "appendd"),
        ({"pretrain": {"mx_steps": 1}}, "--mx_steps"),
        ({"evaluate": {"per_device_eval_batch_size": 0}}, "--per_device_eval_batch_size 0"),
    ],
)
def test_a_wrong_setting_of_any_run_is_refused_before_the_first_begins(tmp_path, changes, told):
    path = study_file(tmp_path, baseline=None, **changes)
    with pytest.raises(UserError) as refused:
        check_all(steps(Study.read(path)), path)
    assert str(path) in str(refused.value) and told in str(refused.value)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("key", ["train_file", "validation_file", "corpus_path"])
def test_a_file_that_a_later_run_cannot_read_is_told_before_the_first_begins(monkeypatch, tmp_path, key):
    """The last task of a study, and its pre-training."""
    (tmp_path / "wrong").mkdir()
    wrong = tmp_path / "wrong" / "reviews.txt"
    wrong.write_text("id\ttext\tlabel\n1\t좋다\t1\n", encoding="utf-8")
    tasks = {
        "klue_nli": {},
        "nsmc": {} if key == "corpus_path" else {"train_file": NSMC, "validation_file": NSMC, key: str(wrong)},
    }
    corpus = {"pretrain": json.loads(SAMPLE.read_text())["pretrain"] | {key: str(tmp_path / "empty")}}
    (tmp_path / "empty").mkdir()
    path = study_file(tmp_path, tasks=tasks, **(corpus if key == "corpus_path" else {}))
    monkeypatch.setattr(sys, "argv", ["pause_study.py", str(path)])
    monkeypatch.setattr(Step, "run", lambda step: pytest.fail(f"{step.name} began"))
    told = "empty: no .txt or .dat file in it" if key == "corpus_path" else "reviews.txt:1: no column 'document'"
    with pytest.raises(UserError, match=told):
        pause_study.main()


@pytest.mark.parametrize("where", ["finetune", "tasks", "finetuning"])
def test_pauses_and_data_are_scored_as_they_were_trained_wherever_they_are_written(tmp_path, where):
    """By the entries' own defaults: what a single run and its evaluation would do."""
    own = {"num_pauses": 3, "pause_placement": "prepend", "max_seq_length": 99, "max_eval_samples": 7}
    kinds = {"finetune": {"max_steps": 1}, "tasks": {"nsmc": {}}, "finetuning": {"X": {}}}
    kinds[where] = own if where == "finetune" else {next(iter(kinds[where])): own}
    todo = steps(Study.read(study_file(tmp_path, baseline=None, seeds=[1], sweep_pauses=[], **kinds)))
    scoring = [step.words for step in todo if step.entry == "finetune/evaluate.py"]
    assert len(scoring) == 2
    for words in scoring:
        told = dict(zip(words[::2], words[1::2], strict=True))
        assert told["--sweep_pauses"] == "0,3" and told["--sweep_placement"] == "prepend"
        assert (told["--max_seq_length"], told["--max_eval_samples"]) == ("99", "7")


def test_a_fine_tuning_says_more_than_its_task_and_that_more_than_all_of_them(tmp_path):
    told = {"learning_rate": 0.1, "warmup_steps": 1, "weight_decay": 0.1}
    tasks = {"nsmc": {"warmup_steps": 2, "weight_decay": 0.2}}
    ways = {"A": {"weight_decay": 0.3}, "B": {}}
    study = Study.read(study_file(tmp_path, finetune=told, tasks=tasks, finetuning=ways, arms=None, baseline=None))
    assert study.merged("A", "nsmc") == {"learning_rate": 0.1, "warmup_steps": 2, "weight_decay": 0.3}
    assert study.merged("B", "nsmc") == {"learning_rate": 0.1, "warmup_steps": 2, "weight_decay": 0.2}


def test_every_cell_goes_on_from_the_pre_training_of_its_seed(tmp_path):
    todo = steps(Study.read(study_file(tmp_path)))
    for step in todo:
        seed = step.name.split("seed ")[1].split(":")[0]
        if step.entry == "finetune/train.py":
            source = step.words[step.words.index("--model_name_or_path") + 1]
            arm = step.name.split("_")[0]
            assert source.endswith(f"pretraining/{arm}-seed{seed}/model") and str(step.needs.folder) in source


def test_a_study_is_every_pair_on_every_task_with_every_seed_after_its_pre_training(tmp_path):
    todo = steps(Study.read(study_file(tmp_path, tasks={"nsmc": {}, "korquad": {}})))
    assert len(todo) == 2 * (2 + 4 * 2 * 2)  # seeds x (pre-trainings + arms x tasks x (train, score))
    done = set()
    for step in todo:
        words = dict(zip(step.words[::2], step.words[1::2], strict=False))
        source = words.get("--model_name_or_path")
        assert source is None or Path(source) in done, "nothing is used before it is made"
        done |= {step.folder / "model", step.folder / step.leaves}
    assert len({step.folder / step.leaves for step in todo}) == len(todo)


@pytest.mark.parametrize("length, share", [(64, 0.1), (128, 0.1), (33, 0.25), (100, 0.5), (1, 0.5), (9, 0.95)])
def test_both_pre_training_arms_see_the_same_text_in_a_step(tmp_path, length, share):
    pretraining = {"StdPT": {}, "PausePT": {"pause_placement": "random", "pause_fraction": share}}
    pretrain = {"config_file": "models/tiny_config.json", "max_seq_length": length, "max_steps": 1}
    study = Study.read(study_file(tmp_path, pretraining=pretraining, pretrain=pretrain))
    rows = {step.name.split(",")[0]: step.words for step in steps(study) if step.entry == "pretrain/train.py"}
    plain, paused = (int(words[words.index("--max_seq_length") + 1]) for words in rows.values())
    assert plain == length
    assert paused - round(share * paused) == length


@pytest.mark.parametrize(
    "share, told",
    [
        (0.999, ("pretraining.PausePT: max_seq_length 64", "with pauses; models/tiny_config.json has 512 positions")),
        (1 - 1e-12, ("pretraining.PausePT: pause_fraction 0.999999999999", "from 0 to 0.999")),
    ],
)
def test_rows_that_are_nearly_all_pauses_are_refused_at_once(tmp_path, share, told):
    pretraining = {"PausePT": {"pause_placement": "random", "pause_fraction": share}}
    pretrain = {"config_file": "models/tiny_config.json", "max_seq_length": 64, "max_steps": 1}
    with refused(*told):
        Study.read(study_file(tmp_path, pretraining=pretraining, pretrain=pretrain, baseline="PausePT_StdFT"))


def test_a_model_that_never_saw_a_pause_is_scored_without(tmp_path):
    study = Study.read(study_file(tmp_path, sweep_pauses=[1, 9]))
    assert study.numbers("StdPT", "StdFT", "nsmc") == [0]
    paused = [study.numbers("PausePT", "StdFT", "nsmc"), study.numbers("StdPT", "PauseFT", "nsmc")]
    assert paused == [[0, 1, 4, 9]] * 2
    assert study.numbers("PausePT", "StdFT", "essay") == [0], "whole texts have no prompt to pause behind"


def stub(folder: Path, code: str, **others) -> Step:
    (folder / "stub.py").write_text(code)
    return Step("a run", str(folder / "stub.py"), [], ["python"], folder / "out", "done", **others)


COUNT = "import pathlib\nf = pathlib.Path('out/count'); f.write_text(f.read_text() + 'x' if f.exists() else 'x')\n"


def test_what_is_done_is_not_run_again_and_a_failure_says_why_and_where_to_read_on(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    failing = stub(tmp_path, COUNT + "print('error: --x 1: too small\\nlast words'); raise SystemExit(2)")
    with pytest.raises(UserError, match=rf"a run: failed, --x 1: too small \(all of it: {tmp_path}/out/done.log\)"):
        run_all([failing])
    killed = stub(tmp_path, COUNT + "import os; print('step 3'); os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="a run: failed, ended by SIGKILL; is the memory too small"):
        run_all([killed])
    with pytest.raises(Diverged):
        run_all([stub(tmp_path, COUNT + "raise SystemExit(4)")])
    working = stub(tmp_path, COUNT + "pathlib.Path('out/done').touch()")
    run_all([working])
    run_all([working])
    assert Path("out/count").read_text() == "xxxx"
    assert "1 of 1 runs are done" in capsys.readouterr().out
    Path("out/done").write_text("other")
    run_all([working])
    assert Path("out/count").read_text() == "xxxxx"


def test_a_run_that_is_still_there_is_waited_for(monkeypatch, tmp_path):
    """One whose study was killed holds its folder; here until the lock is asked for."""
    monkeypatch.chdir(tmp_path)
    step = stub(tmp_path, COUNT)

    class Lock(nullcontext):
        def __init__(self, path):
            assert path == step.folder / ".lock"
            (step.folder / "done").touch()
            (step.folder / "done.command").write_text(step.identity)
            super().__init__()

    step.folder.mkdir()
    monkeypatch.setattr(pause_study, "FileLock", Lock)
    run_all([step])
    assert not Path("out/count").exists()


def begin(step: Step, finished: bool = True) -> None:
    """Leave what a run leaves."""
    (step.folder / "checkpoints/step-1").mkdir(parents=True, exist_ok=True)
    (step.folder / f"{step.leaves}.command").write_text(step.identity)
    if finished:
        (step.folder / step.leaves).touch()


def test_changed_settings_are_refused_with_all_that_came_from_the_old_ones(tmp_path):
    path = study_file(tmp_path)
    todo = steps(Study.read(path))
    pretraining, cell = todo[0], todo[2:4]
    for step in (pretraining, *cell):
        begin(step)
    check_all(todo, path)
    assert all(step.is_done for step in (pretraining, *cell)) and not todo[1].is_done
    changed = study_file(tmp_path, pretrain=json.loads(SAMPLE.read_text())["pretrain"] | {"learning_rate": 0.5})
    with pytest.raises(
        UserError, match=r"begun with other settings or files \(--learning_rate 0.002 then, 0.5 now\)"
    ) as told:
        check_all(steps(Study.read(changed)), changed)
    assert f"delete {pretraining.folder} {cell[0].folder}" in str(told.value)
    shutil.rmtree(pretraining.folder)  # not enough: the cell came from it
    with pytest.raises(UserError, match="begun with other settings"):
        check_all(steps(Study.read(changed)), changed)


def test_other_numbers_of_pauses_are_scored_anew_and_nothing_is_trained_again(tmp_path):
    todo = steps(Study.read(study_file(tmp_path)))
    cell = next(step for step in todo if "PauseFT" in step.name and step.entry == "finetune/train.py")
    begin(cell)
    begin(todo[todo.index(cell) + 1])
    path = study_file(tmp_path, sweep_pauses=[0, 3])
    again = steps(Study.read(path))
    check_all(again, path)
    assert again[todo.index(cell)].is_done and not again[todo.index(cell) + 1].is_done


@pytest.mark.parametrize(
    "flag", ["train_file", "validation_file", "config_file", "corpus_path", "tokenizer_name_or_path"]
)
def test_what_came_from_another_content_of_a_file_is_not_done(tmp_path, flag):
    """Under the same name; a folder by all files in it. A file that is only touched is the same."""
    data = tmp_path / "data"
    data.mkdir()
    file = data / "file.txt"
    file.write_text("가나다")
    kind = "pretrain" if flag in ("config_file", "corpus_path") else "finetune"
    settings = json.loads(SAMPLE.read_text())[kind] | {
        flag: str(data if flag[0] in "ct" and flag[-4:] != "file" else file)
    }
    if flag == "config_file":
        file.write_text((ROOT / "models/tiny_config.json").read_text())
    path = study_file(tmp_path, **{kind: settings})
    todo = steps(Study.read(path))
    for step in todo:
        begin(step)
    os.utime(file)
    again = steps(Study.read(path))
    check_all(again, path)
    assert all(step.is_done for step in again)
    with file.open("a") as more:
        more.write(" ")
    again = steps(Study.read(path))
    stays = [kind == "finetune" and step.entry == "pretrain/train.py" for step in again]
    assert [step.is_done for step in again] == stays
    with pytest.raises(UserError, match=rf"begun with other settings or files .*{data}"):
        check_all(again, path)


def test_what_is_scored_on_another_content_of_a_file_is_scored_anew(tmp_path):
    file = tmp_path / "reviews.txt"
    file.write_text("id\tdocument\tlabel\n1\t글\t1\n")
    path = study_file(tmp_path, evaluate={"validation_file": str(file)})
    for step in steps(Study.read(path)):
        begin(step)
    file.write_text("id\tdocument\tlabel\n1\t글\t0\n")
    todo = steps(Study.read(path))
    check_all(todo, path)
    assert {step.entry for step in todo if not step.is_done} == {"finetune/evaluate.py"}


def test_a_model_that_a_study_makes_is_no_file_that_it_reads(tmp_path):
    todo = steps(Study.read(study_file(tmp_path)))
    for step in todo:
        begin(step)
        if (model := step.folder / "model").is_file():
            model.unlink()
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(step.name)
    assert all(step.is_done for step in todo)


def test_a_run_that_left_nothing_may_begin_with_other_settings(tmp_path):
    path = study_file(tmp_path)
    first = steps(Study.read(path))[0]
    first.folder.mkdir(parents=True)
    (first.folder / "model.command").write_text("python pretrain/train.py --max_steps 1")
    check_all(steps(Study.read(path)), path)


def test_a_folder_that_holds_something_else_is_not_written_to(monkeypatch, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study/report.md").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["pause_study.py", str(study_file(tmp_path))])
    with pytest.raises(UserError, match="holds something else than a study"):
        pause_study.main()
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["report.md"]


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "name one study file"),
        (["a.yaml"], "a.yaml: no .json; name one"),
        (["a.json", "--output_dir", "runs/a"], "unknown argument '--output_dir'"),
    ],
)
def test_a_study_file_must_be_named(monkeypatch, words, told):
    monkeypatch.setattr(sys, "argv", ["pause_study.py", *words])
    with pytest.raises(UserError, match=told):
        pause_study.main()


def result(
    arm: str, seed: int, each: list[float], own: int = 0, task: str = "nsmc", metric: str = "accuracy", **others
) -> Result:
    weights = others.get("weights", [])
    mean = np.average(each, weights=weights or None)
    values = {own: math.exp(mean) if metric == "perplexity" else mean, **others.get("values", {})}
    costs = dict.fromkeys(values, 1.0)
    groups = others.get("groups", range(len(each)))
    return Result(
        arm, task, seed, own, metric, values, {own: np.array(each)}, costs, costs, dict.fromkeys(values, 0),
        list(groups), [], None if metric == "perplexity" else 50.0, [(1, 2.0)], 0.1, weights,
    )  # fmt: skip


def essays(arm: str, seed: int, nats: list[float], **others) -> Result:
    """Texts by their mean losses; each counts by its tokens."""
    return result(arm, seed, nats, task="essay", metric="perplexity", **others)


def test_the_score_of_an_arm_is_mean_and_sample_deviation_over_seeds():
    table = score_table([result("A", 1, [0, 100]), result("A", 2, [100, 100]), result("A", 3, [0, 0])])
    assert table[1] == ["nsmc", "A", "0", "accuracy", "50.00 ± 50.00", "3", "50.00"]


def test_a_difference_is_paired_by_example_and_seed():
    """Scores differ much between examples and by 10 on each: unpaired there would be nothing to see."""
    base = np.linspace(0, 100, 40)
    found = [result("A", 1, base), result("A", 2, base), result("B", 2, base + 10, own=4), result("B", 1, base + 12)]
    (row,) = difference_table(found, "A")[1:]
    assert row == ["nsmc", "B", "+11.00", "+11.00 to +11.00", "better", "+10.00, +12.00"]
    (row,) = difference_table(found, "B")[1:]
    assert row[2:5] == ["-11.00", "-11.00 to -11.00", "worse"]


def test_a_difference_on_which_seeds_disagree_is_not_shown():
    base = np.zeros(50)
    found = [result("A", 1, base), result("A", 2, base), result("B", 1, base + 20), result("B", 2, base - 1)]
    assert difference_table(found, "A")[1][2:5] == ["+9.50", "+9.50 to +9.50", "not shown"]


def test_examples_of_a_group_are_drawn_together():
    """Of two groups of 50 equal values each the mean is one of three values, not the narrow normal interval."""
    groups = [0] * 50 + [1] * 50
    found = [result("A", 1, [0] * 100, groups=groups), result("B", 1, [0] * 50 + [10] * 50, groups=groups)]
    assert difference_table(found, "A")[1][2:5] == ["+5.00", "+0.00 to +10.00", "not shown"]


@pytest.mark.parametrize("make, verdicts", [(result, ["better", "worse"]), (essays, ["worse", "better"])])
def test_a_verdict_goes_by_what_is_better_and_needs_groups_enough(make, verdicts):
    """Of one group there is no interval; five agree by chance in 2 of 32 cases, six in 1 of 32."""
    for num_groups, told in (
        (40, verdicts),
        (6, verdicts),
        (5, ["too few groups (5)"] * 2),
        (1, ["too few groups (1)"] * 2),
    ):
        groups = [k % num_groups for k in range(40)]
        found = [make("A", seed, [1.0] * 40, groups=groups) for seed in (1, 2)]
        found += [make("B", seed, [1.5] * 40, groups=groups) for seed in (1, 2)]
        rows = [difference_table(found, baseline)[1] for baseline in ("A", "B")]
        assert [row[4] for row in rows] == told
        assert all((row[3] == "none") == (num_groups == 1) for row in rows)
    mixed = [make("A", 1, [1.0] * 4, groups=range(4)), make("B", 1, [0.5, 0.5, 1.5, 1.5], groups=range(4))]
    assert difference_table(mixed, "A")[1][4] == "not shown"


def test_a_difference_of_perplexities_is_that_of_the_scores():
    """By hand: losses of ln 2 and ln 8 in texts of 3 and 1 tokens make 2 ** 1.5, ln 4 in both makes 4; in the second
    seed 4 and 8."""
    two, weights = math.log(2), [3.0, 1.0]
    found = [essays("A", 1, [two, 3 * two], weights=weights), essays("A", 2, [2 * two, 2 * two], weights=weights)]
    found += [essays("B", 1, [2 * two, 2 * two], weights=weights), essays("B", 2, [3 * two, 3 * two], weights=weights)]
    row = difference_table(found, "A")[1]
    by_seed = [4 - 2**1.5, 8 - 4]
    assert row[2] == f"{sum(by_seed) / 2:+.2f}" and row[5] == ", ".join(f"{value:+.2f}" for value in by_seed)
    scores = [float(line[4].split(" ±")[0]) for line in score_table(found)[1:]]
    assert float(row[2]) == pytest.approx(scores[1] - scores[0], abs=0.011)
    assert score_table(found)[1][3] == "perplexity (lower is better)" and score_table(found)[1][6] == ""


def test_the_interval_of_a_difference_of_perplexities_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(4)
    tokens = rng.integers(5, 60, 30)
    a, b = rng.normal(3.0, 0.4, (2, 30)) + [[0.0], [0.2]]

    def difference(a, b, tokens, axis):
        return np.subtract(*(np.exp((part * tokens).sum(axis) / tokens.sum(axis)) for part in (b, a)))

    wanted = stats.bootstrap(
        (a, b, tokens), difference, paired=True, method="percentile", n_resamples=10_000, rng=rng
    ).confidence_interval
    found = [essays("A", 1, a.tolist(), weights=tokens.tolist()), essays("B", 1, b.tolist(), weights=tokens.tolist())]
    low, high = map(float, difference_table(found, "A")[1][3].split(" to "))
    width = wanted.high - wanted.low
    assert low == pytest.approx(wanted.low, abs=0.03 * width) and high == pytest.approx(wanted.high, abs=0.03 * width)


def test_a_study_of_essays_is_read_in_its_own_unit(tmp_path):
    cell = {"num_pauses": 0, "score": "perplexity", "value": 25.0, "each": [3.0, 4.0], "weights": [5, 2], "scores": {}}
    cell |= {"seconds_per_example": 0.1, "tokens_per_example": 9.0, "num_cut": 0}
    told = {"cells": [cell], "groups": [0, 1], "warnings": []}
    (tmp_path / "sweep.json").write_text(json.dumps(told))
    found = Result.read("A", "essay", 1, 0, tmp_path)
    assert (found.value, found.each[0].tolist(), found.weights, found.majority) == (25.0, [3.0, 4.0], [5, 2], None)
    assert as_csv([found]).splitlines()[1].split(",")[5:7] == ["perplexity", "25.0"]
    (tmp_path / "sweep.json").write_text(json.dumps(told | {"cells": [cell | {"weights": []}]}))
    with pytest.raises(UserError, match="has no weights of its texts; delete it"):
        Result.read("A", "essay", 1, 0, tmp_path)


@pytest.mark.parametrize(("metric", "scale"), [("accuracy", 100.0), ("f1", 1.0), ("exact_match", 1.0)])
def test_shares_are_read_as_percent_seconds_as_milliseconds_and_written_by_number(tmp_path, metric, scale):
    cells = [
        {"num_pauses": num, "score": metric, "value": value, "each": [0.0, 2 * value], "scores": {"majority": 0.25},
         "seconds_per_example": seconds, "tokens_per_example": 9.0 + num, "num_cut": num}
        for num, value, seconds in ((4, 0.5, 0.125), (0, 0.25, 0.5))
    ]  # fmt: skip
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells, "groups": [0, 1], "warnings": []}))
    points = [
        {"step": k, "train/loss": 4.0 - k, "train/step_time_seconds": t} for k, t in ((1, 0.5), (2, 0.1), (3, 0.2))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, points)))
    found = Result.read("A", "nsmc", 7, 4, tmp_path)
    assert found.values == {4: 0.5 * scale, 0: 0.25 * scale} and found.majority == 0.25 * scale
    assert {num: each.tolist() for num, each in found.each.items()} == {4: [0.0, scale], 0: [0.0, 0.5 * scale]}
    assert (found.milliseconds, found.tokens, found.cut) == ({4: 125.0, 0: 500.0}, {4: 13.0, 0: 9.0}, {4: 4, 0: 0})
    assert (found.losses, found.step_seconds) == ([(1, 3.0), (2, 2.0), (3, 1.0)], 0.2)
    assert as_csv([found]).splitlines()[1:] == [
        f"nsmc,A,7,0,0,{metric},{0.25 * scale},9.0,0.5", f"nsmc,A,7,4,1,{metric},{0.5 * scale},13.0,0.125",
    ]  # fmt: skip
    other = Result.read("B", "nsmc", 7, 0, tmp_path)
    assert as_csv([other]).splitlines()[1].split(",")[4] == "1"


def test_a_pre_training_is_told_by_its_median_step_and_the_mean_of_its_last_losses(tmp_path):
    paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl", tmp_path / "gone.jsonl"]
    for path, losses, seconds in ((paths[0], (9.0, 5.0, 2.0), 0.1), (paths[1], (8.0, 4.0, 3.0), 0.3)):
        points = [
            {"step": k, "train/loss": x, "train/step_time_seconds": seconds}
            for k, x in zip((1, 5, 9), losses, strict=True)
        ]
        points.append({"step": 9, "eval/loss": 7.0})
        path.write_text("\n".join(map(json.dumps, points)))
    assert pretraining_table({"StdPT": paths, "none": paths[2:]})[1:] == [["StdPT", "", "200", "9", "2.5000"]]
    assert pretraining_table({"none": paths[2:]}) == []


@pytest.mark.parametrize("make, label", [(result, "accuracy (%)"), (essays, "perplexity (lower is better)")])
def test_a_picture_names_the_unit_of_its_score(make, label):
    for draw in (plot_scores, plot_pauses):
        figure = Figure()
        draw(figure, [make(arm, seed, [1.0, 2.0], values={3: 5.0}) for arm in "AB" for seed in (1, 2)])
        assert [axes.get_ylabel() for axes in figure.axes] == [label]


def test_seeds_that_only_one_of_two_arms_has_finished_are_left_out():
    found = [result("A", 1, [0, 0]), result("B", 1, [50, 50]), result("B", 2, [100, 100])]
    assert difference_table(found, "A")[1][2] == "+50.00"
    assert len(difference_table(found[::2], "A")) == 1, "no common seed, no row"


def test_arms_scored_on_other_examples_are_not_compared():
    with refused("nsmc, B: scored on other examples than A", "give all the same data"):
        difference_table([result("A", 1, [0, 0]), result("B", 1, [0, 0, 0])], "A")


def test_the_best_number_of_pauses_is_that_of_the_highest_mean():
    found = [result("A", seed, [value], own=4, values={0: 10.0, 9: 30.0}) for seed, value in ((1, 0.0), (2, 50.0))]
    assert pauses_table(found)[1] == ["nsmc", "A", "10.00", "25.00", "30.00", "9"]
    found = [
        essays("A", 1, [0.0], own=4, values={0: 10.0, 9: 0.5}),
        essays("A", 2, [0.0], own=4, values={0: 9.0, 9: 0.7}),
    ]
    assert pauses_table(found)[1] == ["essay", "A", "9.50", "1.00", "0.60", "9"]


def test_a_number_of_pauses_that_a_seed_lacks_is_not_the_best():
    found = [result("A", 1, [20.0], values={9: 90.0, 4: 30.0}), result("A", 2, [20.0], values={4: 50.0, 2: 80.0})]
    assert pauses_table(found)[1] == ["nsmc", "A", "20.00", "20.00", "40.00", "4"]


def test_costs_are_medians_over_seeds_with_the_arms_own_pauses():
    costs = ((0.1, 20.0, 7.0), (0.9, 80.0, 3.0), (0.2, 21.0, 4.0))
    found = [
        replace(
            result("A", k, [1.0], own=4), step_seconds=step, tokens={0: 1.0, 4: tokens}, milliseconds={0: 1.0, 4: ms}
        )
        for k, (step, tokens, ms) in enumerate(costs)
    ]
    assert cost_table(found)[1] == ["nsmc", "A", "200", "21.0", "4.0", "0"]


def test_the_bootstrap_interval_is_the_normal_one_for_many_values():
    """By the central limit theorem: mean -+ 1.96 standard errors."""
    values = np.random.default_rng(3).normal(2.0, 5.0, size=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    low, high = bootstrap_interval(values, range(4000))
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert bootstrap_interval([7.0] * 5, range(5)) == pytest.approx((7.0, 7.0))


def test_the_report_is_one_page_that_loads_nothing(tmp_path):
    log = tmp_path / "metrics.jsonl"
    points = [{"step": k, "train/loss": 4.0 - k, "train/step_time_seconds": 0.5} for k in (1, 2)]
    log.write_text("".join(json.dumps(point) + "\n" for point in points) + '{"step": 3, "tra')
    found = [result(arm, seed, [0, 100, 100]) for arm in ("<A>", "B") for seed in (1, 2)]
    files = write_report(tmp_path, "Pauses <1>", found, "B", {"StdPT": [log, tmp_path / "none"]}, "{}", "python x")
    assert all(path.stat().st_size for path in files)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;A&gt;" in page and "<A>" not in page and "<h1>Pauses &lt;1&gt;</h1>" in page
    assert re.findall(r"""(?:src|href)=["']([^:]*):""", page) == ["data"] * 3
    assert "66.67 ± 0.00" in page and "±" not in score_table(found[:1])[1][4]
    assert "66.67 ± 0.00" in page and "66.67 ± 0.00" in (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\((.*\.png)\)", (tmp_path / "report.md").read_text(encoding="utf-8")):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + len(found)


@pytest.mark.slow
def test_the_shipped_study_goes_on_after_it_was_killed(monkeypatch, tmp_path):
    """Killed as the third run begins; what was finished stays as it was, and a cell is what its command gives alone."""
    values = json.loads(SAMPLE.read_text(encoding="utf-8"))
    short = {kind: values[kind] | {"max_steps": 2, "logging_steps": 1} for kind in ("pretrain", "finetune")}
    short["finetune"] |= {"eval_steps": 2, "max_eval_samples": 4}
    path = study_file(tmp_path, seeds=[1], sweep_pauses=[0, 4], **short)
    command = [sys.executable, str(ROOT / "scripts/pause_study.py"), str(path)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in first.stdout:
        if line.startswith("[3/10]"):
            break
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = tmp_path / "study/pretraining/StdPT-seed1/model/model.safetensors"
    before = kept.stat().st_mtime_ns
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 of 10 runs are done" in second.stdout and kept.stat().st_mtime_ns == before
    assert (tmp_path / "study/report.html").stat().st_size > 10_000
    step = steps(Study.read(path))[2]
    alone = [word.replace(str(tmp_path / "study/StdPT"), str(tmp_path / "alone")) for word in step.words]
    assert run_script(shlex.join([step.entry, *alone])).returncode == 0
    (folder,) = tmp_path.glob("alone*")
    scores = json.loads((folder / "nsmc/seed1/scores.json").read_text())
    assert scores == json.loads((step.folder / "scores.json").read_text())
    monkeypatch.setattr(sys, "argv", ["pause_study.py", str(path), "--report_only"])
    monkeypatch.setattr(subprocess, "Popen", None)
    pause_study.main()
    assert shlex.split(step.command)[1] == "finetune/train.py"
